"""The demo: small models trained apart on digits, aligned, merged and measured."""

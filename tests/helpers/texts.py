"""A small vocabulary and texts, with tokenizers and configurations of models that read them."""

from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BertConfig, PreTrainedTokenizerFast

SPEECH = "the a cat dog bird sat ran flew on under over mat log sky and then slept soundly until noon"


WORDS = SPEECH.split()
BERT_TOKENS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
SMALL = {"hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1, "intermediate_size": 16}
TEXTS = [" ".join(WORDS[(i * k + k) % len(WORDS)] for k in range(3 + i % 5)) for i in range(40)]


def tokenizer(special, **named):
    vocabulary = {word: i for i, word in enumerate([*special, *WORDS])}
    fast = Tokenizer(models.WordLevel(vocabulary, unk_token=special[1] if "[UNK]" in special else WORDS[0]))
    fast.pre_tokenizer = pre_tokenizers.Whitespace()
    if "[CLS]" in special:
        ends = [("[CLS]", vocabulary["[CLS]"]), ("[SEP]", vocabulary["[SEP]"])]
        fast.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=ends)
    return PreTrainedTokenizerFast(tokenizer_object=fast, **named)


def bert_tokenizer(**other):
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "mask_token": "[MASK]"}
    return tokenizer(BERT_TOKENS, **names, cls_token="[CLS]", sep_token="[SEP]", **other)


def gpt_tokenizer(**other):
    return tokenizer(["<end>"], **({"eos_token": "<end>"} | other))


def bert_config(**other):
    return BertConfig(vocab_size=len(WORDS) + 5, max_position_embeddings=24, **SMALL, **other)

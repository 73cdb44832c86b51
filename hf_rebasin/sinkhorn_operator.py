def sinkhorn(x, temperature=1.0, iterations=20, *, implicit=True):
    z = x / temperature
    for _ in range(iterations):
        z = z - z.logsumexp(-2, keepdim=True)
        z = z - z.logsumexp(-1, keepdim=True)
    return z.exp()

from jaxllm.data.inspect import inspect


def test_inspect_counts_and_shows(make_store, tokenizer):
    texts = ["short one\n", "a rather longer document " * 20, "third"]
    store = make_store(texts)
    text = inspect(store, tokenizer, 2, length=64)
    total = sum(map(len, texts))
    assert f"source notes: 3 documents, {store.tokens:,} tokens, {total:,} bytes" in text
    assert f"{total / store.tokens:.2f} bytes a token" in text and f"longest document 1: {store.lengths[1]}" in text
    assert "document 1:" in text and "document 2:" not in text and "⏎" in text and "segment 1:" in text
    assert "cut" not in text and "1 documents are cut" in inspect(store, tokenizer, length=64, pack=False)

"""`detailflow serve`: the model over HTTP, as OpenAI's images API has it (docs/serve.md). Needs the extra `serve`."""

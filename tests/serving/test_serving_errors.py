"""How OpenAI's API says what went wrong."""

from tpilite.serving.errors import too_long, unknown_model


def test_errors_that_depend_on_the_model() -> None:
    error = too_long(100, 30, 128, "messages")
    assert (error.status, error.code, error.param) == (400, "context_length_exceeded", "messages")
    assert "128" in str(error)
    assert "30 new" in str(error)
    error = unknown_model("gpt-9", "m")
    assert (error.status, error.code) == (404, "model_not_found")

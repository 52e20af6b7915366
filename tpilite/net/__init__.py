"""The network: bytes (`wire`), then I/O (`channel`), then meaning (`group`); slices over HTTP beside them."""

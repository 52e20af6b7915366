// The server's API: requests with the key that this browser keeps, and answers as they are made.

const KEY = "tpilite.key";

export const key = {
  get: () => localStorage.getItem(KEY) ?? "",
  set: (value) => localStorage.setItem(KEY, value),
  forget: () => localStorage.removeItem(KEY),
};

export class ApiError extends Error {
  constructor(status, error) {
    super(error?.message ?? `the server answered with status ${status}`);
    this.status = status;
    this.code = error?.code ?? null;
  }
}

async function ask(path, options = {}) {
  const headers = { ...(options.headers ?? {}) };
  if (key.get()) headers.Authorization = `Bearer ${key.get()}`;
  const response = await fetch(path, { ...options, headers, cache: "no-store" });
  if (response.ok) return response;
  let error = null;
  try {
    error = (await response.json()).error;
  } catch {
    // Something between here and the server answered in its own way.
  }
  throw new ApiError(response.status, error);
}

export async function cluster() {
  return (await ask("v1/cluster")).json();
}

// Yields {thought, text, reason, usage} for every chunk, and {paused} for every comment that keeps the stream alive.
export async function* stream(path, body, signal) {
  const response = await ask(path, {
    method: "POST",
    signal,
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify({ ...body, stream: true, stream_options: { include_usage: true } }),
  });
  for await (const event of events(response.body)) {
    if (event.startsWith(":")) {
      yield { paused: event.includes("waiting") };
      continue;
    }
    const data = event.replace(/^data: /, "");
    if (data === "[DONE]") return;
    const chunk = JSON.parse(data);
    if (chunk.error) throw new ApiError(503, chunk.error);
    const choice = chunk.choices[0];
    yield {
      thought: choice?.delta?.reasoning_content ?? "",
      text: choice?.delta?.content ?? choice?.text ?? "",
      reason: choice?.finish_reason ?? null,
      usage: chunk.usage ?? null,
    };
  }
  throw new ApiError(0, { message: "the connection ended before the answer was complete" });
}

async function* events(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      const parts = (rest + value).split("\n\n");
      rest = parts.pop();
      yield* parts.filter(Boolean);
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

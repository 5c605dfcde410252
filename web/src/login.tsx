import { useState } from "preact/hooks";
import { type ApiError, get, key } from "./api";
import { Trouble } from "./widgets";

/** Asks for an API key and tries it. */
export function Login({ done }: { done: () => void }) {
  const [error, setError] = useState<ApiError>();
  const [pending, setPending] = useState(false);
  const submit = async (event: SubmitEvent) => {
    event.preventDefault();
    const given = new FormData(event.currentTarget as HTMLFormElement).get("key");
    key.set(String(given).trim());
    setPending(true);
    try {
      await get("/sandboxes?limit=1");
      done();
    } catch (failure) {
      key.forget();
      setError(failure as ApiError);
    } finally {
      setPending(false);
    }
  };
  return (
    <main class="login">
      <form onSubmit={submit}>
        <h1>bhatti</h1>
        <label>
          API key
          <input name="key" type="password" autocomplete="current-password" required autofocus spellcheck={false} />
        </label>
        <p class="hint">
          The daemon's admin creates keys: <code>bhatti user create NAME</code>. This tab keeps the key until it closes.
        </p>
        <Trouble error={error} />
        <button class="primary" disabled={pending}>
          Log in
        </button>
      </form>
    </main>
  );
}

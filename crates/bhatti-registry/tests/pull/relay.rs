//! A relay in front of a registry, which misbehaves as a test asks for.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Notify;
use tokio::task::AbortHandle;

/// A request that a relay received.
pub(crate) struct Request {
    /// Requests before it.
    pub(crate) number: u32,
    head: String,
}

impl Request {
    pub(crate) fn is_blob(&self) -> bool {
        self.head.contains("/blobs/")
    }

    /// Whether it is for the layer. The configuration is asked for before it.
    pub(crate) fn is_layer(&self) -> bool {
        self.is_blob() && self.number != 1
    }

    fn token(&self) -> Option<u32> {
        let line = self.head.lines().find(|line| line.starts_with("authorization: Bearer "));
        line.and_then(|line| line.rsplit(' ').next()?.parse().ok())
    }
}

/// How a relay answers.
pub(crate) enum Answer {
    /// As the registry does.
    Relay,
    /// As the registry does, and closes the connection after this many bytes.
    Cut(usize),
    /// As the registry does, and sends nothing after this many bytes.
    Hang(usize),
    /// As the registry does, with another byte at this position.
    Flip(usize),
    /// With a body that never ends.
    Endless,
    /// With this response.
    Own(String),
}

impl Answer {
    pub(crate) fn status(status: u16, header: &str) -> Self {
        let header = if header.is_empty() { String::new() } else { format!("{header}\r\n") };
        Self::Own(format!(
            "HTTP/1.1 {status} X\r\n{header}Content-Length: 0\r\nConnection: close\r\n\r\n"
        ))
    }

    pub(crate) fn redirect(to: &str) -> Self {
        Self::status(307, &format!("Location: {to}"))
    }

    fn text(text: &str) -> Self {
        let length = text.len();
        Self::Own(format!(
            "HTTP/1.1 200 X\r\nContent-Length: {length}\r\nConnection: close\r\n\r\n{text}"
        ))
    }
}

type Choose = dyn Fn(&Request) -> Answer + Send + Sync;

#[derive(Default)]
struct State {
    requests: AtomicU32,
    sent: AtomicU64,
    tokens: AtomicU32,
    hangs: Notify,
}

/// A running relay. It ends when it is dropped.
pub(crate) struct Relay {
    /// Its address and port.
    pub(crate) server: String,
    state: Arc<State>,
    task: AbortHandle,
}

impl Drop for Relay {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Relay {
    pub(crate) fn start(
        registry: &str,
        choose: impl Fn(&Request) -> Answer + Send + Sync + 'static,
    ) -> Self {
        Self::with_state(registry, Arc::default(), Arc::new(choose))
    }

    /// Asks for tokens, and issues them. Each is valid for `uses` requests.
    pub(crate) fn with_tokens(registry: &str, uses: u32) -> Self {
        let state: Arc<State> = Arc::default();
        let (issued, used) = (Arc::clone(&state), AtomicU32::new(0));
        let choose = move |request: &Request| {
            if request.head.starts_with("GET /token") {
                used.store(0, Ordering::SeqCst);
                let token = issued.tokens.fetch_add(1, Ordering::SeqCst) + 1;
                return Answer::text(&format!(r#"{{"token":"{token}","expires_in":300}}"#));
            }
            let is_valid = request.token() == Some(issued.tokens.load(Ordering::SeqCst))
                && used.fetch_add(1, Ordering::SeqCst) < uses;
            if is_valid {
                return Answer::Relay;
            }
            let host = request.head.lines().find_map(|line| line.strip_prefix("host: "));
            let realm = format!("http://{}/token", host.unwrap());
            Answer::status(401, &format!(r#"WWW-Authenticate: Bearer realm="{realm}",service="s""#))
        };
        Self::with_state(registry, state, Arc::new(choose))
    }

    fn with_state(registry: &str, state: Arc<State>, choose: Arc<Choose>) -> Self {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        listener.set_nonblocking(true).unwrap();
        let server = listener.local_addr().unwrap().to_string();
        let listener = TcpListener::from_std(listener).unwrap();
        let (registry, serving) = (registry.to_owned(), Arc::clone(&state));
        let task = tokio::spawn(async move {
            loop {
                let (client, _) = listener.accept().await.unwrap();
                let (registry, state) = (registry.clone(), Arc::clone(&serving));
                let choose = Arc::clone(&choose);
                // A client that goes away ends its connection.
                tokio::spawn(async move { serve(client, &registry, &state, &*choose).await });
            }
        });
        Self { server, state, task: task.abort_handle() }
    }

    /// Bytes that were sent to clients.
    pub(crate) fn sent(&self) -> u64 {
        self.state.sent.load(Ordering::SeqCst)
    }

    /// Tokens that were issued.
    pub(crate) fn tokens(&self) -> u32 {
        self.state.tokens.load(Ordering::SeqCst)
    }

    /// Waits until an answer hangs.
    pub(crate) async fn hangs(&self) {
        self.state.hangs.notified().await;
    }
}

/// Serves one request of a connection.
async fn serve(
    mut client: TcpStream,
    registry: &str,
    state: &State,
    choose: &Choose,
) -> std::io::Result<()> {
    let head = read_head(&mut client).await?;
    let number = state.requests.fetch_add(1, Ordering::SeqCst);
    let request = Request { number, head };
    let answer = choose(&request);
    let (limit, flip) = match answer {
        Answer::Own(response) => return client.write_all(response.as_bytes()).await,
        Answer::Endless => return send_endlessly(&mut client, state).await,
        Answer::Relay => (usize::MAX, None),
        Answer::Cut(bytes) | Answer::Hang(bytes) => (bytes, None),
        Answer::Flip(position) => (usize::MAX, Some(position)),
    };
    let mut upstream = TcpStream::connect(registry).await?;
    let head = request.head.trim_end();
    upstream.write_all(format!("{head}\r\nconnection: close\r\n\r\n").as_bytes()).await?;
    let (mut at, mut buffer) = (0, vec![0; 16 << 10]);
    while at < limit {
        let length = upstream.read(&mut buffer).await?;
        if length == 0 {
            return Ok(());
        }
        let data = &mut buffer[..length.min(limit - at)];
        if let Some(position) = flip.filter(|position| (at..at + data.len()).contains(position)) {
            data[position - at] ^= 1;
        }
        client.write_all(data).await?;
        state.sent.fetch_add(data.len() as u64, Ordering::SeqCst);
        at += data.len();
    }
    if matches!(answer, Answer::Hang(_)) {
        state.hangs.notify_one();
        std::future::pending::<()>().await;
    }
    Ok(())
}

async fn read_head(client: &mut TcpStream) -> std::io::Result<String> {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        head.push(client.read_u8().await?);
    }
    Ok(String::from_utf8_lossy(&head).into_owned())
}

async fn send_endlessly(client: &mut TcpStream, state: &State) -> std::io::Result<()> {
    client.write_all(b"HTTP/1.1 200 X\r\nConnection: close\r\n\r\n").await?;
    loop {
        client.write_all(&[b' '; 16 << 10]).await?;
        state.sent.fetch_add(16 << 10, Ordering::SeqCst);
    }
}

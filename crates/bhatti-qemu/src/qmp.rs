//! QEMU's monitor (docs/interop/qmp-spec.rst): lines of JSON. Events are ignored.

use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use bhatti_engine::VmmError;
use bhatti_host::socket;
use serde::Deserialize;
use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::UnixStream;
use tokio::sync::Mutex;
use tokio::time::timeout;

pub(crate) const SOCKET: &str = "qmp.sock";

/// Time limit of a command without disk I/O. QEMU's main loop serves commands between other work.
const COMMAND_LIMIT: Duration = Duration::from_secs(10);

/// Maximum length of a line from a VMM, in bytes.
const LINE_BYTES_MAX: u64 = 1 << 20;

/// The monitor of one VMM. It serves one connection at a time, so only one is opened.
#[derive(Debug)]
pub struct Qmp {
    directory: PathBuf,
    connection: Mutex<Option<Connection>>,
}

#[derive(Debug)]
struct Connection {
    stream: BufReader<UnixStream>,
    version: String,
    last_id: u64,
}

/// A message from QEMU.
#[derive(Deserialize)]
struct Message {
    #[serde(rename = "QMP")]
    greeting: Option<Greeting>,
    id: Option<u64>,
    #[serde(rename = "return")]
    value: Option<Value>,
    error: Option<Refusal>,
}

#[derive(Deserialize)]
struct Greeting {
    version: Version,
}

#[derive(Deserialize)]
struct Version {
    qemu: Numbers,
    package: String,
}

#[derive(Deserialize)]
struct Numbers {
    major: u32,
    minor: u32,
    micro: u32,
}

#[derive(Deserialize)]
struct Refusal {
    desc: String,
}

impl Qmp {
    /// Creates the monitor of the VMM in `directory`, not connected yet.
    pub(crate) fn new(directory: &Path) -> Self {
        Self { directory: directory.to_owned(), connection: Mutex::new(None) }
    }

    /// Returns QEMU's version, including its package version.
    pub(crate) async fn version(&self) -> Result<String, VmmError> {
        let limited = timeout(COMMAND_LIMIT, async {
            let mut slot = self.connection.lock().await;
            let connection = match slot.take() {
                Some(connection) => connection,
                None => Connection::open(&self.directory).await?,
            };
            let version = connection.version.clone();
            *slot = Some(connection);
            Ok(version)
        });
        limited.await.unwrap_or(Err(VmmError::Silent { limit: COMMAND_LIMIT }))
    }

    /// Executes a QEMU command that takes no noticeable time. See [`execute`](Self::execute).
    pub(crate) async fn ask(&self, command: &str, arguments: Value) -> Result<Value, VmmError> {
        self.execute(command, arguments, COMMAND_LIMIT).await
    }

    /// Executes a QEMU command and returns its result.
    ///
    /// # Cancel safety
    ///
    /// The command may or may not have been executed. The next call opens a new connection.
    pub(crate) async fn execute(
        &self,
        command: &str,
        arguments: Value,
        limit: Duration,
    ) -> Result<Value, VmmError> {
        let limited = timeout(limit, async {
            let mut slot = self.connection.lock().await;
            // Taken out of its slot while in use: an interrupted connection is not used again.
            let mut connection = match slot.take() {
                Some(connection) => connection,
                None => Connection::open(&self.directory).await?,
            };
            let answer = connection.execute(command, &arguments).await;
            if matches!(answer, Ok(_) | Err(VmmError::Refused(_))) {
                *slot = Some(connection);
            }
            answer
        });
        limited.await.unwrap_or(Err(VmmError::Silent { limit }))
    }
}

impl Connection {
    async fn open(directory: &Path) -> Result<Self, VmmError> {
        let stream = BufReader::new(socket::connect_in(directory, SOCKET).await?);
        let mut connection = Self { stream, version: String::new(), last_id: 0 };
        let Greeting { version: Version { qemu: Numbers { major, minor, micro }, package } } =
            connection.receive().await?.greeting.ok_or(VmmError::Garbled)?;
        connection.version = format!("{major}.{minor}.{micro} {package}").trim_end().to_owned();
        connection.execute("qmp_capabilities", &json!({})).await?;
        Ok(connection)
    }

    async fn execute(&mut self, command: &str, arguments: &Value) -> Result<Value, VmmError> {
        self.last_id += 1;
        let request = json!({"execute": command, "arguments": arguments, "id": self.last_id});
        self.stream.write_all(format!("{request}\n").as_bytes()).await?;
        loop {
            let message = self.receive().await?;
            if message.id != Some(self.last_id) {
                continue;
            }
            return match (message.value, message.error) {
                (Some(value), _) => Ok(value),
                (None, Some(refusal)) => Err(VmmError::Refused(refusal.desc)),
                (None, None) => Err(VmmError::Garbled),
            };
        }
    }

    async fn receive(&mut self) -> Result<Message, VmmError> {
        let mut line = Vec::new();
        let length = (&mut self.stream).take(LINE_BYTES_MAX).read_until(b'\n', &mut line).await?;
        if length == 0 {
            return Err(VmmError::Unreachable(io::ErrorKind::UnexpectedEof.into()));
        }
        serde_json::from_slice(&line).map_err(|_| VmmError::Garbled)
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixListener;

    use super::*;

    /// Starts a monitor that sends each of `answers`, and reads a line after each.
    fn monitor(directory: &Path, answers: Vec<&'static str>) {
        let listener: UnixListener = socket::listen_in(directory, SOCKET).unwrap();
        std::thread::spawn(move || {
            use std::io::{BufRead, BufReader, Write};
            let (mut stream, _) = listener.accept().unwrap();
            let mut lines = BufReader::new(stream.try_clone().unwrap()).lines();
            for answer in answers {
                stream.write_all(answer.as_bytes()).unwrap();
                if lines.next().is_none() {
                    return;
                }
            }
        });
    }

    const GREETING: &str = "{\"QMP\": {\"version\": {\"qemu\": {\"micro\": 2, \"minor\": 0, \"major\": 10}, \"package\": \"Debian\"}}}\n";

    #[tokio::test]
    async fn answers_events_and_refusals_are_distinguished() {
        let directory = tempfile::tempdir().unwrap();
        let answers = vec![
            GREETING,
            "{\"return\": {}, \"id\": 1}\n",
            "{\"event\": \"STOP\"}\n{\"return\": {\"status\": \"paused\"}, \"id\": 2}\n",
            "{\"error\": {\"class\": \"GenericError\", \"desc\": \"no\"}, \"id\": 3}\n",
            "nonsense\n",
            "",
        ];
        monitor(directory.path(), answers);
        let qmp = Qmp::new(directory.path());
        let ask = |command: &'static str| qmp.ask(command, json!({}));

        assert_eq!(qmp.version().await.unwrap(), "10.0.2 Debian");
        assert_eq!(ask("query-status").await.unwrap()["status"], "paused");
        assert!(matches!(ask("x").await, Err(VmmError::Refused(why)) if why == "no"));
        assert!(matches!(ask("x").await, Err(VmmError::Garbled)));
    }

    #[tokio::test]
    async fn mute_monitor_is_silent_and_missing_monitor_is_unreachable() {
        let directory = tempfile::tempdir().unwrap();
        let qmp = Qmp::new(directory.path());
        let limit = Duration::from_millis(20);
        let ask = || qmp.execute("stop", json!({}), limit);
        assert!(matches!(ask().await, Err(VmmError::Unreachable(_))));

        let _listener = socket::listen_in(directory.path(), SOCKET).unwrap();

        assert!(matches!(ask().await, Err(VmmError::Silent { .. })));
    }
}

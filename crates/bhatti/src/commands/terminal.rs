//! Connects a terminal of this machine to a terminal in a sandbox.
//!
//! ```text
//!  keys ──► keyboard ──► (detach keys) ──► queue ──► sender ──► session
//!  screen ◄────────────────────────────────────────────────────── session
//! ```
//!
//! Keys are read from the first moment on, whatever the connection does, so that detaching always
//! works. The terminal is restored however the session ends: [`Settings`] restores its settings
//! when dropped, and signals that would kill this process end the loop instead.

use std::io::{self, IsTerminal, Write};
use std::process::ExitCode;
use std::sync::Arc;

use bhatti_client::{ClientError, ShellEvent, ShellInput, ShellOptions, ShellOutput};
use bytes::Bytes;
use rustix::termios::{LocalModes, OptionalActions, Termios, tcgetattr, tcgetwinsize, tcsetattr};
use tokio::io::AsyncReadExt;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::{Semaphore, mpsc};

use super::Context;
use super::detach_keys::{DetachKeys, Detector};
use super::exec::exit_code;
use crate::error::CliError;

/// Ctrl+C: cancels, as long as there is no session yet that could receive it.
const INTERRUPT: u8 = 0x03;
/// Ctrl+D: the end of input, for a session whose input is not a terminal.
const END: u8 = 0x04;

/// Maximum size of one read from the keyboard, in bytes.
const KEYS: usize = 4096;
/// Maximum number of pieces of piped input that are in flight.
const PIPED_PIECES: usize = 16;

/// Changed settings of the terminal, which are restored when this is dropped.
pub(super) struct Settings {
    before: Termios,
}

impl Settings {
    /// Passes on every key unchanged.
    fn raw() -> io::Result<Self> {
        Self::change(Termios::make_raw)
    }

    /// Hides what the user types.
    pub(super) fn hidden() -> io::Result<Self> {
        Self::change(|settings| settings.local_modes.remove(LocalModes::ECHO))
    }

    fn change(change: impl FnOnce(&mut Termios)) -> io::Result<Self> {
        let before = tcgetattr(io::stdin())?;
        let mut changed = before.clone();
        change(&mut changed);
        tcsetattr(io::stdin(), OptionalActions::Now, &changed)?;
        Ok(Self { before })
    }
}

impl Drop for Settings {
    fn drop(&mut self) {
        // If the terminal is gone, there is nothing to restore.
        let _: rustix::io::Result<()> = tcsetattr(io::stdin(), OptionalActions::Now, &self.before);
    }
}

/// How a session ended for this client.
enum Outcome {
    /// The session's process ended.
    Exit(i32),
    /// The client detached, and the session keeps running.
    Left,
}

/// Input on its way to a session.
enum Input {
    Keys(Bytes),
    Size { rows: u16, cols: u16 },
}

/// The session, as far as this client knows it.
struct Session {
    id: Option<String>,
}

/// Connects this terminal to a session in a sandbox, until the session ends or the user detaches.
pub(super) async fn run(
    context: &Context,
    sandbox: &str,
    mut options: ShellOptions,
    detach_keys: &DetachKeys,
) -> Result<ExitCode, CliError> {
    let is_terminal = io::stdin().is_terminal();
    options.size = size();
    let mut signals = Signals::catch()?;
    let raw = if is_terminal { Some(Settings::raw()?) } else { None };
    let mut session = Session { id: options.session.clone() };
    let keyboard = Keyboard::start(is_terminal, detach_keys);
    let outcome = tokio::select! {
        outcome = attend(context, sandbox, &options, keyboard, &mut session) => outcome,
        number = signals.next() => Err(CliError::interrupted(number)),
    };
    drop(raw);
    let back = session.id.map(|id| format!("bhatti shell {sandbox} --attach {id}"));
    match outcome {
        Ok(Outcome::Exit(code)) => Ok(exit_code(code)),
        Ok(Outcome::Left) => {
            let back = back.unwrap_or_else(|| format!("bhatti shell {sandbox}"));
            say(context, is_terminal, &format!("detached; reattach with: {back}"));
            Ok(ExitCode::SUCCESS)
        }
        Err(error) => {
            if is_terminal {
                say(context, true, "");
            }
            Err(match back {
                Some(back) if error.is_lost() => {
                    error.hint(format!("the session keeps running; reattach with: {back}"))
                }
                _ => error,
            })
        }
    }
}

/// Prints a message on a line of its own, wherever the cursor was left.
fn say(context: &Context, is_terminal: bool, text: &str) {
    if !context.output.quiet {
        let before = if is_terminal { "\r\n" } else { "" };
        // If this fails, there is no place left to report it.
        drop(writeln!(io::stderr(), "{before}{text}"));
    }
}

/// Connects to the session and relays input and output.
async fn attend(
    context: &Context,
    sandbox: &str,
    options: &ShellOptions,
    mut keyboard: Keyboard,
    session: &mut Session,
) -> Result<Outcome, CliError> {
    let open = context.change(sandbox, async |id| context.client.open_shell(id, options).await);
    let (input, mut output) = tokio::select! {
        opened = open => opened?,
        () = keyboard.gives_up() => return Ok(Outcome::Left),
    };
    let mut sizes = signal(SignalKind::window_change())?;
    let (queue, queued) = mpsc::unbounded_channel();
    let sending = send(input, queued, keyboard.window.clone());
    tokio::pin!(sending);
    loop {
        tokio::select! {
            event = output.next() => match event? {
                ShellEvent::Session { id, .. } => session.id = Some(id),
                ShellEvent::Output(bytes) => show(&bytes)?,
                ShellEvent::Exit(code) => return Ok(Outcome::Exit(code)),
            },
            keys = keyboard.next() => match keys {
                Keys::Some(keys) => drop(queue.send(Input::Keys(keys))),
                Keys::Leave(keys) => {
                    drop(queue.send(Input::Keys(keys)));
                    drop(queue);
                    return Ok(leave(sending, output).await);
                }
            },
            _ = sizes.recv() => if let Some((rows, cols)) = size() {
                drop(queue.send(Input::Size { rows, cols }));
            },
            // The output has the reason why nothing more can be sent.
            _gone = &mut sending => return last_words(output, session).await,
        }
    }
}

/// Detaches after the session has received the earlier input, unless it accepts none within a
/// limit.
async fn leave(
    sending: impl Future<Output = Result<(), ClientError>>,
    output: ShellOutput,
) -> Outcome {
    const LIMIT: std::time::Duration = std::time::Duration::from_millis(500);
    drop(tokio::time::timeout(LIMIT, sending).await);
    drop(output);
    Outcome::Left
}

/// Relays the remaining output of a session that accepts no more input.
async fn last_words(mut output: ShellOutput, session: &mut Session) -> Result<Outcome, CliError> {
    loop {
        match output.next().await? {
            ShellEvent::Session { id, .. } => session.id = Some(id),
            ShellEvent::Output(bytes) => show(&bytes)?,
            ShellEvent::Exit(code) => return Ok(Outcome::Exit(code)),
        }
    }
}

fn show(bytes: &[u8]) -> io::Result<()> {
    let mut stdout = io::stdout().lock();
    stdout.write_all(bytes)?;
    stdout.flush()
}

/// Sends the queued input in order, and detaches at the end of the queue.
async fn send(
    mut input: ShellInput,
    mut queued: mpsc::UnboundedReceiver<Input>,
    window: Arc<Semaphore>,
) -> Result<(), ClientError> {
    while let Some(next) = queued.recv().await {
        match next {
            Input::Keys(keys) if keys.is_empty() => {}
            Input::Keys(keys) => {
                input.write(&keys).await?;
                window.add_permits(1);
            }
            Input::Size { rows, cols } => input.resize(rows, cols).await?,
        }
    }
    input.leave().await
}

/// Returns the size of the output's terminal: rows and columns.
fn size() -> Option<(u16, u16)> {
    let size = tcgetwinsize(io::stdout()).or_else(|_| tcgetwinsize(io::stdin())).ok()?;
    (size.ws_row > 0 && size.ws_col > 0).then_some((size.ws_row, size.ws_col))
}

/// Typed keys.
enum Keys {
    /// Keys for the session.
    Some(Bytes),
    /// Keys for the session, before the detach keys.
    Leave(Bytes),
}

/// Standard input, read as it comes.
struct Keyboard {
    keys: mpsc::UnboundedReceiver<Bytes>,
    /// Keys that were typed before there was a session.
    early: Vec<Bytes>,
    /// Looks for the detach keys, if the input is a terminal.
    detector: Option<Detector>,
    /// Pieces that may still be read. A user may type any number.
    window: Arc<Semaphore>,
}

impl Keyboard {
    fn start(is_terminal: bool, detach_keys: &DetachKeys) -> Self {
        let permits = if is_terminal { Semaphore::MAX_PERMITS / 2 } else { PIPED_PIECES };
        let window = Arc::new(Semaphore::new(permits));
        let (read, keys) = mpsc::unbounded_channel();
        let room = Arc::clone(&window);
        tokio::spawn(async move {
            let mut stdin = tokio::io::stdin();
            let mut buffer = vec![0; KEYS];
            let mut begins_line = true;
            // The window is never closed.
            while let Ok(permit) = room.acquire().await {
                permit.forget();
                // A broken terminal counts as ended.
                let length = stdin.read(&mut buffer).await.unwrap_or_default();
                let keys = match (buffer[..length].last(), begins_line) {
                    (Some(last), _) => {
                        begins_line = *last == b'\n';
                        &buffer[..length]
                    }
                    (None, true) => &[END][..],
                    // After an unfinished line, the first Ctrl+D only submits the line.
                    (None, false) => &[END, END],
                };
                if read.send(Bytes::copy_from_slice(keys)).is_err() || length == 0 {
                    return;
                }
            }
        });
        let detector = is_terminal.then(|| Detector::new(detach_keys));
        Self { keys, early: Vec::new(), detector, window }
    }

    /// Waits until the user cancels. Keeps all other keys.
    async fn gives_up(&mut self) {
        while let Some(keys) = self.keys.recv().await {
            let (keys, detached) = self.detect(keys);
            if detached || (self.detector.is_some() && keys.contains(&INTERRUPT)) {
                return;
            }
            self.early.push(keys);
        }
        std::future::pending::<()>().await;
    }

    /// Waits for keys. At the end of the input, waits forever.
    async fn next(&mut self) -> Keys {
        if !self.early.is_empty() {
            return Keys::Some(self.early.remove(0));
        }
        let keys = match self.keys.recv().await {
            Some(keys) => keys,
            None => std::future::pending().await,
        };
        match self.detect(keys) {
            (keys, true) => Keys::Leave(keys),
            (keys, false) => Keys::Some(keys),
        }
    }

    /// Returns the keys for the session, and whether the user typed the detach keys.
    fn detect(&mut self, keys: Bytes) -> (Bytes, bool) {
        match &mut self.detector {
            Some(detector) => {
                let (keys, detached) = detector.feed(&keys);
                (keys.into(), detached)
            }
            None => (keys, false),
        }
    }
}

/// Signals that would kill this process without restoring the terminal.
struct Signals([Signal; 4]);

impl Signals {
    const CAUGHT: [SignalKind; 4] = [
        SignalKind::hangup(),
        SignalKind::interrupt(),
        SignalKind::quit(),
        SignalKind::terminate(),
    ];

    fn catch() -> io::Result<Self> {
        let [hangup, interrupt, quit, terminate] = Self::CAUGHT;
        Ok(Self([signal(hangup)?, signal(interrupt)?, signal(quit)?, signal(terminate)?]))
    }

    async fn next(&mut self) -> u8 {
        super::exec::next_signal(&mut self.0, &Self::CAUGHT).await
    }
}

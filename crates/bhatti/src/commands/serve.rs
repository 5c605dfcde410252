//! `bhatti serve`.

use std::fs::{self, File, TryLockError};
use std::io::{self, IsTerminal, Write};
use std::net::SocketAddr;
use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use bhatti_edge::Tls;
use bhatti_server::{
    AppState, PublicAddress, StateParts, bind, serve_public, serve_tcp, serve_unix,
};
use bhatti_store::Store;
use bhatti_types::UserId;
use clap::Args;
use serde_json::json;
use tokio::net::TcpListener;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep, timeout};
use tracing::{info, warn};
use tracing_subscriber::EnvFilter;

use super::{Context, control, secret_key};
use crate::config::Config;
use crate::error::CliError;
use crate::paths;

/// Time limit for requests in flight when the daemon stops.
const DRAIN_LIMIT: Duration = Duration::from_secs(5);

/// How long a starting daemon waits for the lock, which another daemon or its children may hold.
const LOCK_LIMIT: Duration = Duration::from_secs(3);

/// Interval of attempts to take the lock.
const LOCK_LOOK: Duration = Duration::from_millis(5);

#[derive(Debug, Args)]
#[command(after_help = "Example:\n  bhatti serve --listen 127.0.0.1:8080")]
pub(crate) struct Serve {
    /// Also listen on this address, for callers with an API key [default: `listen` in config.yaml]
    #[arg(long, value_name = "ADDRESS")]
    listen: Option<SocketAddr>,
    /// Save all sandboxes when the daemon stops, instead of leaving them running
    #[arg(long)]
    stop_sandboxes: bool,
    /// Delete all secrets before starting, if their key is lost
    #[arg(long)]
    forget_secrets: bool,
    /// Format of the log
    #[arg(long, value_enum, env = "BHATTI_LOG_FORMAT", default_value_t = LogFormat::Text)]
    log_format: LogFormat,
}

/// The format of the log.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum LogFormat {
    /// A readable line per entry.
    Text,
    /// A JSON object per line.
    Json,
}

pub(crate) fn run(context: &Context, arguments: &Serve) -> Result<ExitCode, CliError> {
    let started = Instant::now();
    bhatti_host::process::settle_daemon()?;
    start_logging(arguments.log_format);
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    let result = runtime.block_on(serve(context, arguments, started));
    runtime.shutdown_background();
    result.map(|()| ExitCode::SUCCESS)
}

fn start_logging(format: LogFormat) {
    let filter = EnvFilter::try_from_env("BHATTI_LOG").unwrap_or_else(|_| EnvFilter::new("info"));
    let ansi = io::stderr().is_terminal() && std::env::var_os("NO_COLOR").is_none();
    let log = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(io::stderr)
        .with_ansi(ansi)
        .with_target(false);
    match format {
        LogFormat::Text => log.init(),
        LogFormat::Json => log.json().init(),
    }
}

async fn serve(context: &Context, arguments: &Serve, started: Instant) -> Result<(), CliError> {
    let data_dir = &context.data_dir;
    paths::create_data_dir(data_dir)?;
    let _lock = lock(data_dir).await?;
    let config = Config::read(data_dir)?;
    // Before any process can find this daemon and ask it to stop.
    let mut stop_signal = StopSignal::catch()?;
    let store = Arc::new(Store::open(data_dir).map_err(|error| CliError::of(&error))?);
    if arguments.forget_secrets {
        secret_key::forget_secrets(data_dir, &store)?;
    }
    let control = control::make(data_dir, &config, &store).await?;
    // The daemon listens while its sandboxes are adopted in the background.
    control.recover().await.map_err(|error| CliError::of(&error))?.detach();

    let (stop, stopped) = watch::channel(false);
    let public = match config.public_listen {
        Some(address) => Some(bind(address).await.map_err(|error| CliError::of(&error))?),
        None => None,
    };
    let tls = config.tls()?;
    let state = AppState::new(StateParts {
        control,
        started,
        public: PublicAddress {
            listener: public.as_ref().map(TcpListener::local_addr).transpose()?,
            zone: config.public_zone.clone(),
            tls: tls.is_some(),
        },
        proxy_limit: config.proxy_limit(),
        stopping: stopped.clone(),
    });
    let state = state.map_err(|error| CliError::of(&error))?;
    let address = arguments.listen.or(config.listen);
    let servers = listen(&state, data_dir, (address, public, tls), &stopped).await?;
    announce(&state, data_dir, started);

    let ahead = state.control.clone();
    tokio::spawn(async move { ahead.start_spares().await });
    tokio::spawn(state.control.clone().prune_events());
    tokio::spawn(state.control.clone().watch_networks());
    state.control.record(
        "daemon.started",
        UserId::ADMIN,
        None,
        json!({ "version": env!("CARGO_PKG_VERSION") }),
    );

    stop_signal.wait().await;
    if arguments.stop_sandboxes {
        info!("Stopping; sandboxes are saved");
    } else {
        info!("Stopping; sandboxes keep running");
    }
    stop.send_replace(true);
    let drained = async {
        servers.join_all().await;
        // The servers do not count connections that became WebSockets.
        state.drained().await;
    };
    if timeout(DRAIN_LIMIT, drained).await.is_err() {
        warn!("Cut off requests that were still running");
    }
    state.control.shut_down(arguments.stop_sandboxes).await;
    state.control.record("daemon.stopped", UserId::ADMIN, None, json!({}));
    Ok(())
}

/// The API's address, the listener for published ports, and their TLS.
type Network = (Option<SocketAddr>, Option<TcpListener>, Option<Arc<Tls>>);

/// Opens the listeners, and serves on them until the daemon stops.
async fn listen(
    state: &AppState,
    data_dir: &Path,
    (address, public, tls): Network,
    stopped: &watch::Receiver<bool>,
) -> Result<JoinSet<()>, CliError> {
    let stopping = || {
        let mut stopped = stopped.clone();
        async move {
            // If the sender is gone, the daemon is stopping, too.
            drop(stopped.wait_for(|stopped| *stopped).await.map(|_| ()));
        }
    };
    let mut servers = JoinSet::new();
    if let Some(address) = address {
        let served = serve_tcp(state.clone(), address, tls.clone(), stopping()).await;
        let (address, tcp) = served.map_err(|error| CliError::of(&error))?;
        servers.spawn(tcp);
        info!(tls = tls.is_some(), %address, "Listening for callers with an API key");
        if tls.is_none() && !address.ip().is_loopback() {
            warn!(
                "API keys and everything else travel unencrypted: set `tls_certificate` and `tls_key` in config.yaml, or put a TLS proxy in front"
            );
        }
    }
    if let Some(listener) = public {
        let served = serve_public(state.clone(), listener, tls, stopping());
        let (address, public) = served.map_err(|error| CliError::of(&error))?;
        servers.spawn(public);
        info!(%address, "Listening for requests to published ports");
    }
    // The socket comes last: a client that finds it must find everything ready.
    let unix = serve_unix(state.clone(), data_dir, stopping());
    servers.spawn(unix.map_err(|error| CliError::of(&error))?);
    Ok(servers)
}

/// Logs the daemon's network, engine and start-up time.
fn announce(state: &AppState, data_dir: &Path, started: Instant) {
    match state.control.network() {
        Ok(mode) => info!(network = mode.as_str(), "Sandboxes have a network"),
        Err(why) => warn!(why, "Sandboxes have no network"),
    }
    let engine = state.control.capabilities();
    if engine.shares_kernel {
        warn!(
            engine = engine.name,
            "Sandboxes are containers and share this host's kernel: they are less isolated than virtual machines"
        );
    }
    let startup_ms = u64::try_from(started.elapsed().as_millis()).unwrap_or(u64::MAX);
    info!(data_dir = %data_dir.display(), engine = engine.name, accelerator = engine.accelerator_name(), startup_ms, "Daemon ready");
}

/// Takes the lock of the data directory if no daemon runs on it.
pub(super) fn try_lock(data_dir: &Path) -> io::Result<Option<File>> {
    let file = open_lock(data_dir)?;
    Ok(take(&file)?.then_some(file))
}

fn open_lock(data_dir: &Path) -> io::Result<File> {
    fs::OpenOptions::new().create(true).append(true).open(data_dir.join("daemon.lock"))
}

/// Takes the lock that makes this the only daemon on the data directory. The lock ends with the
/// process, however the process ends, or a moment later: a child that the process was starting
/// holds a copy until the child executes another program.
async fn lock(data_dir: &Path) -> Result<File, CliError> {
    let mut file = open_lock(data_dir)?;
    if !take(&file)? {
        info!("Waiting for another daemon to release the lock");
        let taken = timeout(LOCK_LIMIT, async {
            while !take(&file)? {
                sleep(LOCK_LOOK).await;
            }
            io::Result::Ok(())
        });
        taken.await.map_err(|_| {
            CliError::new(format!("another daemon runs on `{}`", data_dir.display()))
                .hint("stop it first, or choose another directory with --data-dir")
        })??;
    }
    // So that a user can stop the daemon: kill $(cat daemon.lock).
    file.set_len(0)?;
    writeln!(file, "{}", std::process::id())?;
    Ok(file)
}

/// Tries to lock the file. Returns false if another process holds the lock.
fn take(file: &File) -> io::Result<bool> {
    match file.try_lock() {
        Ok(()) => Ok(true),
        Err(TryLockError::WouldBlock) => Ok(false),
        Err(TryLockError::Error(error)) => Err(error),
    }
}

/// The signals that stop the daemon.
struct StopSignal {
    terminate: Signal,
    interrupt: Signal,
}

impl StopSignal {
    /// Catches the signals: from here on, they do not kill the daemon but are waited for.
    fn catch() -> io::Result<Self> {
        Ok(Self {
            terminate: signal(SignalKind::terminate())?,
            interrupt: signal(SignalKind::interrupt())?,
        })
    }

    async fn wait(&mut self) {
        tokio::select! {
            _ = self.terminate.recv() => {}
            _ = self.interrupt.recv() => {}
        }
    }
}

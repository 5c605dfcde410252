//! The cost of the HTTP API over the agent channel below it.

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, ensure};
use bhatti_agent::AgentClient;
use bhatti_engine::conformance::random_id;
use bhatti_engine::{Disks, Engine, RestoreSpec, Vm};
use bhatti_proto::{ExecRequest, GuestConfig, Identity};
use bhatti_qemu::{PROGRAM, Qemu, QemuEngine};
use bhatti_store::{NewSandbox, Store};
use bhatti_testkit::{Api, Serve, TestDaemon};
use bhatti_types::{SandboxId, SandboxSpec, SandboxState, TimeLimit, UserId};
use bytes::Bytes;
use http_body_util::{BodyExt, Full};
use hyper::Request;
use hyper::client::conn::http1::{self, SendRequest};
use hyper_util::rt::TokioIo;
use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::time::Instant;

use super::{median, resident_mib, show};

/// Stopped sandboxes in the store, and running ones.
const ROWS: u16 = 1000;
const RUNNING: usize = 10;

const REQUESTS: usize = 500;
const EXECS: usize = 200;

/// Compared commands over HTTP and on the channel: all of them, those in each turn, and those at
/// the start of a turn that do not count.
const COMPARED: usize = 600;
const PER_TURN: usize = 10;
const WARM_UP: usize = 4;
const AT_ONCE: usize = 100;

/// Size of each transfer through the proxy, in bytes.
const TRANSFER: usize = 64 << 20;
const TRANSFERS: usize = 5;

const LIMIT: Duration = Duration::from_secs(60);

/// Program for a server that answers each request with as many zeros as its path says.
const SERVER: &str = r#"
import socketserver
class H(socketserver.StreamRequestHandler):
    def handle(self):
        n = int(self.rfile.readline().split(b"/")[1].split()[0])
        while self.rfile.readline().strip(): pass
        self.wfile.write(b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: %d\r\n\r\n" % n)
        zeros = bytes(1 << 20)
        for _ in range(n >> 20): self.wfile.write(zeros)
socketserver.ThreadingTCPServer.allow_reuse_address = True
socketserver.ThreadingTCPServer(("127.0.0.1", 8000), H).serve_forever()
"#;

/// Measures and prints the section `api`.
pub(super) async fn measure() -> Result<()> {
    // A spare that starts during the measurement would take CPU time.
    let config = "ready_vmms: 0\n".to_owned();
    let mut daemon = TestDaemon::start_with(Serve { config, ..Serve::default() }).await;
    let origin = daemon.client.create(&bhatti_testkit::named("bench")).await?.origin;
    let template = origin.strip_prefix("template ").context("not forked from a base snapshot")?;
    let template = daemon.data_dir().join("templates").join(template).canonicalize()?;
    daemon.terminate().await;
    fill(daemon.data_dir())?;
    daemon.serve().await;
    let api = Api::admin(&daemon);

    requests(&api).await?;
    execs(&mut daemon).await?;
    command_line(&daemon, &api).await?;
    at_once(&api).await?;
    let bare = BareVm::start(&template, bhatti_testkit::enter_own_network()).await?;
    proxy(&api, &bare).await?;
    for number in 1..RUNNING {
        daemon.client.create(&bhatti_testkit::named(&format!("running-{number}"))).await?;
    }
    let what = format!("daemon, {ROWS} sandboxes, {RUNNING} running, resident");
    println!("{what:44} {:>26.1} MiB", resident_mib(daemon.pid())?);
    bare.end().await
}

/// Fills the store with stopped sandboxes.
fn fill(data_dir: &Path) -> Result<()> {
    let store = Store::open(data_dir)?;
    (0..ROWS).try_for_each(|number| add_stopped(&store, number))
}

/// Adds the stopped sandbox `stopped-<number>`, owned by the admin.
pub(super) fn add_stopped(store: &Store, number: u16) -> Result<()> {
    let mut entropy = [0xbe; 8];
    entropy[6..].copy_from_slice(&number.to_be_bytes());
    let id = SandboxId::from_entropy(entropy);
    let spec = SandboxSpec::plain(format!("stopped-{number}").parse()?, "minimal".parse()?);
    let (origin, agent_token) = ("boot".to_owned(), String::new());
    let owner = UserId::ADMIN;
    store.insert_sandbox(NewSandbox {
        id,
        owner,
        spec,
        origin,
        agent_token,
        time_limit: TimeLimit::default(),
        volumes: Vec::new(),
    })?;
    Ok(store.set_sandbox_state(&store.claim(id)?, SandboxState::Stopped)?)
}

/// Opens a persistent connection.
pub(super) async fn kept(api: &Api) -> Result<SendRequest<Full<Bytes>>> {
    let (sender, connection) = http1::handshake(TokioIo::new(api.connect().await)).await?;
    tokio::spawn(connection);
    Ok(sender)
}

pub(super) async fn send(
    sender: &mut SendRequest<Full<Bytes>>,
    method: &str,
    path: &str,
    body: String,
) -> Result<Bytes> {
    let request = Request::builder().method(method).uri(path).header("host", "bench");
    let response = sender.send_request(request.body(Full::new(Bytes::from(body)))?).await?;
    ensure!(response.status().is_success(), "{path}: {}", response.status());
    Ok(response.into_body().collect().await?.to_bytes())
}

async fn requests(api: &Api) -> Result<()> {
    let mut sender = kept(api).await?;
    let mut ask = async |path: &str, requests: usize| {
        let mut times = Vec::new();
        for _ in 0..requests {
            let began = Instant::now();
            send(&mut sender, "GET", path, String::new()).await?;
            times.push(began.elapsed());
        }
        anyhow::Ok(times)
    };
    show("GET /health", ask("/health", REQUESTS).await?);
    let first = ask("/sandboxes", 1).await?[0];
    show("GET /sandboxes, with 1,000 of them", ask("/sandboxes", REQUESTS).await?);
    println!("{:44} {:>26.2} ms", "  the first of a daemon", first.as_secs_f64() * 1e3);
    Ok(())
}

/// A VM without a daemon, as the baseline of the daemon's figures.
pub(super) struct BareVm {
    engine: QemuEngine,
    id: SandboxId,
    place: tempfile::TempDir,
    agent: AgentClient,
    _vm: Arc<dyn Vm>,
}

impl BareVm {
    /// Starts a VM from a base snapshot. `has_network` must say whether the base snapshot has a
    /// network card.
    pub(super) async fn start(template: &Path, has_network: bool) -> Result<Self> {
        let engine = Qemu::engine(PROGRAM.into());
        let place = tempfile::tempdir()?;
        let id = random_id();
        let spec = RestoreSpec {
            id,
            directory: place.path().join("vm"),
            snapshot: template.to_owned(),
            disks: Disks::Frozen,
            tap: has_network.then(|| bhatti_net::tap_name(id)),
            volumes: Vec::new(),
            root: None,
            limit: LIMIT,
        };
        let vm = engine.stage(&spec).await?.load().await?;
        vm.resume().await?;
        let agent = AgentClient::new(vm.channel());
        agent.reach().await?;
        let now = SystemTime::now().duration_since(UNIX_EPOCH)?.as_nanos();
        let entropy = "AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA=".to_owned();
        // Gives the guest an identity, as every sandbox's guest has: its settings then differ from
        // those of the base snapshot.
        let identity = Identity {
            entropy,
            wall_clock_ns: u64::try_from(now)?,
            machine_id: "0".repeat(32),
            config: GuestConfig { hostname: "bare".to_owned(), ..GuestConfig::default() },
            rehearsal: false,
        };
        agent.assume_identity(&identity).await?;
        Ok(Self { engine, id, place, agent, _vm: vm })
    }

    /// Removes the VM.
    pub(super) async fn end(self) -> Result<()> {
        Ok(self.engine.remove(self.id, &self.place.path().join("vm")).await?)
    }
}

/// Measures the same command over HTTP and on the agent channel alone.
async fn execs(daemon: &mut TestDaemon) -> Result<()> {
    let (mut http, mut channel) = exec_pairs(daemon, COMPARED).await?;
    let mut over: Vec<f64> = http
        .chunks_mut(PER_TURN)
        .zip(channel.chunks_mut(PER_TURN))
        .map(|(http, channel)| median(http).as_secs_f64() - median(channel).as_secs_f64())
        .collect();
    over.sort_by(f64::total_cmp);
    show("exec `true` through HTTP, connection kept", http);
    show("exec `true` on the agent channel alone", channel);
    // Compares adjacent turns. If the machine changes its speed during the run, the p50 of all
    // samples moves by more than the difference.
    let what = format!("  over the channel alone, p50 of {} turns'", over.len());
    println!("{what:44} {:>26.2} ms", over[over.len() / 2] * 1e3);
    Ok(())
}

/// Measures the same command over HTTP and on the agent channel alone, in turns. Both use one VM,
/// because two VMs differ by more than the two ways: the daemon leaves the VM to this process and
/// adopts it again. Each way is first in every other turn.
pub(super) async fn exec_pairs(
    daemon: &mut TestDaemon,
    rounds: usize,
) -> Result<(Vec<Duration>, Vec<Duration>)> {
    let id: SandboxId = daemon.client.inspect("bench").await?.id.parse()?;
    let directory = daemon.data_dir().join("sandboxes").join(id.to_string());
    let row = Store::open(daemon.data_dir())?.get_sandbox(id)?.context("the sandbox has a row")?;
    let (mut http, mut channel) = (Vec::new(), Vec::new());
    for _ in 0..rounds / PER_TURN / 2 {
        through_http(daemon, &mut http).await?;
        daemon.terminate().await;
        for _ in 0..2 {
            on_channel(&directory, &row.agent_token, &mut channel).await?;
        }
        daemon.serve().await;
        through_http(daemon, &mut http).await?;
    }
    Ok((http, channel))
}

async fn through_http(daemon: &TestDaemon, times: &mut Vec<Duration>) -> Result<()> {
    let mut sender = kept(&Api::admin(daemon)).await?;
    let body = json!({ "cmd": ["true"] }).to_string();
    for round in 0..WARM_UP + PER_TURN {
        let began = Instant::now();
        send(&mut sender, "POST", "/sandboxes/bench/exec", body.clone()).await?;
        if round >= WARM_UP {
            times.push(began.elapsed());
        }
    }
    Ok(())
}

async fn on_channel(directory: &Path, token: &str, times: &mut Vec<Duration>) -> Result<()> {
    let vm = super::forks::adopt(directory).await?;
    let agent = AgentClient::new(vm.channel()).with_token(token.as_bytes());
    for round in 0..WARM_UP + PER_TURN {
        let request = ExecRequest { argv: vec!["true".to_owned()], ..ExecRequest::default() };
        let began = Instant::now();
        let (code, ..) = agent.run(request).await?;
        ensure!(code == 0, "true failed");
        if round >= WARM_UP {
            times.push(began.elapsed());
        }
    }
    Ok(())
}

/// Measures the same command by `bhatti exec`, a process each time, and over HTTP on a persistent
/// connection, in turns.
async fn command_line(daemon: &TestDaemon, api: &Api) -> Result<()> {
    let mut sender = kept(api).await?;
    let body = json!({ "cmd": ["true"] }).to_string();
    let (mut http, mut process) = (Vec::new(), Vec::new());
    for _ in 0..EXECS {
        let began = Instant::now();
        send(&mut sender, "POST", "/sandboxes/bench/exec", body.clone()).await?;
        http.push(began.elapsed());
        let began = Instant::now();
        let status = daemon.cli(&["exec", "bench", "--", "true"]).status().await?;
        process.push(began.elapsed());
        ensure!(status.success(), "`bhatti exec` failed");
    }
    let over = median(&mut process).as_secs_f64() - median(&mut http).as_secs_f64();
    show("exec `true` by the command line", process);
    show("  and through HTTP meanwhile", http);
    println!("{:44} {:>26.2} ms", "  over HTTP, by p50", over * 1e3);
    Ok(())
}

async fn at_once(api: &Api) -> Result<()> {
    let began = Instant::now();
    let mut commands = tokio::task::JoinSet::new();
    for number in 0..AT_ONCE {
        let api = api.clone();
        commands.spawn(async move {
            let ran = api.exec("bench", json!({ "cmd": ["echo", number.to_string()] })).await;
            ran["exit_code"] == 0 && ran["stdout"] == format!("{number}\n")
        });
    }
    let succeeded = commands.join_all().await.into_iter().filter(|succeeded| *succeeded).count();
    let what = format!("{AT_ONCE} execs at once: {succeeded} succeeded");
    println!("{what:44} {:>26.1} ms", began.elapsed().as_secs_f64() * 1e3);
    Ok(())
}

/// Measures bytes of an application through the proxy, and on a stream of the agent channel alone.
async fn proxy(api: &Api, bare: &BareVm) -> Result<()> {
    let serve = ["python3", "-c", SERVER].map(str::to_owned).to_vec();
    let job = json!({ "cmd": serve, "detach": true });
    api.exec("bench", job).await;
    let request = ExecRequest { argv: serve, ..ExecRequest::default() };
    bare.agent.create_detached(request).await?;
    let path = format!("/sandboxes/bench/proxy/8000/{TRANSFER}");
    let listening = async {
        while api.get("/sandboxes/bench/proxy/8000/0").await.status != 200
            || bare.agent.forward(8000).await.is_err()
        {}
    };
    tokio::time::timeout(LIMIT, listening).await?;

    let (mut proxied, mut raw) = (Vec::new(), Vec::new());
    for _ in 0..TRANSFERS {
        let began = Instant::now();
        let answer = api.get(&path).await;
        ensure!(answer.body.len() == TRANSFER, "{} bytes came", answer.body.len());
        proxied.push(began.elapsed());
        let began = Instant::now();
        let mut stream = bare.agent.forward(8000).await?;
        stream.write_all(format!("GET /{TRANSFER} HTTP/1.1\r\n\r\n").as_bytes()).await?;
        let mut buffer = vec![0; 64 * 1024];
        let mut received = 0;
        while received < TRANSFER {
            let length = stream.read(&mut buffer).await?;
            ensure!(length > 0, "the stream ended after {received} bytes");
            received += length;
        }
        raw.push(began.elapsed());
    }
    let rate =
        |times: &mut [Duration]| TRANSFER as f64 / f64::from(1 << 20) / median(times).as_secs_f64();
    let (proxied, raw) = (rate(&mut proxied), rate(&mut raw));
    println!("{:44} {proxied:>24.0} MiB/s", "64 MiB through the proxy, p50 of 5");
    println!("{:44} {raw:>24.0} MiB/s", "  on the agent channel alone");
    println!("{:44} {:>26.2} ×", "  of the channel's rate", proxied / raw);
    Ok(())
}

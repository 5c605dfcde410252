//! Files and streams through the API, on persistent connections.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use bhatti_testkit::{Api, TestDaemon, named};
use bytes::Bytes;
use futures_util::future::try_join_all;
use http_body_util::{BodyExt, Full};
use hyper::Request;
use hyper::client::conn::http1::SendRequest;
use serde_json::json;
use tokio::time::Instant;

use super::api::{kept, send};
use super::{ROUNDS, median, show};

const SMALL: &str = "/sandboxes/bench/files?path=/workspace/small";
const LARGE: &str = "/sandboxes/bench/files?path=/workspace/large";
const LINES: &str = "/sandboxes/bench/files?path=/workspace/lines";

const SMALL_BYTES: usize = 1 << 10;
const LARGE_BYTES: usize = 1 << 20;
/// Lines of a text, and of the part of it that is read.
const TEXT_LINES: usize = 10_000;
const FIRST_LINES: usize = 100;

const READERS: usize = 5;
const COMMANDS: usize = 10;

/// The pause between the first and the last line of the streamed command.
const SILENCE: Duration = Duration::from_millis(100);

/// Measures and prints the section `files`.
pub(super) async fn measure() -> Result<()> {
    let daemon = TestDaemon::start().await;
    daemon.client.create(&named("bench")).await?;
    let api = Api::admin(&daemon);
    let mut sender = kept(&api).await?;
    small(&mut sender).await?;
    parallel(&api, &mut sender).await?;
    truncated(&mut sender).await?;
    streaming(&mut sender).await?;
    commands_at_once(&api, &mut sender).await
}

/// Measures `act` [`ROUNDS`] times, after ten runs that do not count.
async fn time(mut act: impl AsyncFnMut() -> Result<()>) -> Result<Vec<Duration>> {
    let mut times = Vec::new();
    for round in 0..ROUNDS + 10 {
        let began = Instant::now();
        act().await?;
        if round >= 10 {
            times.push(began.elapsed());
        }
    }
    Ok(times)
}

/// Prints the ratio of the medians of `slow` and `fast`.
fn compare(what: &str, slow: &mut [Duration], fast: &mut [Duration]) {
    let ratio = median(slow).as_secs_f64() / median(fast).as_secs_f64();
    println!("{:44} {ratio:>26.2} × {what}, by p50", "");
}

async fn small(sender: &mut SendRequest<Full<Bytes>>) -> Result<()> {
    let content = "x".repeat(SMALL_BYTES);
    let times = time(async || {
        send(sender, "PUT", SMALL, content.clone()).await?;
        let read = send(sender, "GET", SMALL, String::new()).await?;
        ensure!(read == content, "another content was read");
        Ok(())
    });
    show("a file of 1 KiB written and read", times.await?);
    Ok(())
}

async fn parallel(api: &Api, sender: &mut SendRequest<Full<Bytes>>) -> Result<()> {
    send(sender, "PUT", LARGE, "x".repeat(LARGE_BYTES)).await?;
    let read = async |sender: &mut SendRequest<Full<Bytes>>| {
        let read = send(sender, "GET", LARGE, String::new()).await?;
        ensure!(read.len() == LARGE_BYTES, "{} bytes were read", read.len());
        Ok(())
    };
    let mut one = time(async || read(sender).await).await?;
    let mut senders = try_join_all((0..READERS).map(|_| kept(api))).await?;
    let mut all = time(async || try_join_all(senders.iter_mut().map(read)).await.map(drop)).await?;
    show("a file of 1 MiB read", one.clone());
    show(&format!("  {READERS} times at once"), all.clone());
    compare("once", &mut all, &mut one);
    Ok(())
}

async fn truncated(sender: &mut SendRequest<Full<Bytes>>) -> Result<()> {
    let text: String = (0..TEXT_LINES).map(|number| format!("line {number}\n")).collect();
    let length = text.len();
    send(sender, "PUT", LINES, text).await?;
    let mut whole = time(async || {
        let read = send(sender, "GET", LINES, String::new()).await?;
        ensure!(read.len() == length, "{} bytes were read", read.len());
        Ok(())
    })
    .await?;
    let path = format!("{LINES}&limit={FIRST_LINES}");
    let mut first = time(async || {
        let read = send(sender, "GET", &path, String::new()).await?;
        let lines = read.iter().filter(|byte| **byte == b'\n').count();
        ensure!(lines == FIRST_LINES, "{lines} lines were read");
        Ok(())
    })
    .await?;
    show(&format!("a text of {TEXT_LINES} lines read"), whole.clone());
    show(&format!("  its first {FIRST_LINES} lines"), first.clone());
    compare("the whole text", &mut first, &mut whole);
    Ok(())
}

/// Measures a command whose output is streamed: the time to its first line, and to its end.
async fn streaming(sender: &mut SendRequest<Full<Bytes>>) -> Result<()> {
    let script = format!("echo first; sleep {}; echo last", SILENCE.as_secs_f64());
    let body = json!({ "cmd": ["sh", "-c", script] }).to_string();
    let (mut first, mut total) = (Vec::new(), Vec::new());
    for _ in 0..ROUNDS {
        let request = Request::post("/sandboxes/bench/exec").header("host", "bench");
        let request = request.header("accept", "application/x-ndjson");
        let began = Instant::now();
        let response = sender.send_request(request.body(Full::from(body.clone()))?).await?;
        let mut body = response.into_body();
        let mut lines = Vec::new();
        while let Some(frame) = body.frame().await {
            lines.extend_from_slice(&frame?.into_data().ok().context("a piece of the body")?);
            if first.len() == total.len() && lines.windows(5).any(|part| part == b"first") {
                first.push(began.elapsed());
            }
        }
        total.push(began.elapsed());
        ensure!(first.len() == total.len(), "no first line came");
    }
    show("a stream's first line", first);
    show(&format!("  and its end, {} ms later", SILENCE.as_millis()), total);
    Ok(())
}

async fn commands_at_once(api: &Api, sender: &mut SendRequest<Full<Bytes>>) -> Result<()> {
    let body = json!({ "cmd": ["true"] }).to_string();
    let run = async |sender: &mut SendRequest<Full<Bytes>>| {
        send(sender, "POST", "/sandboxes/bench/exec", body.clone()).await.map(drop)
    };
    let mut one = time(async || run(sender).await).await?;
    let mut senders = try_join_all((0..COMMANDS).map(|_| kept(api))).await?;
    let mut all = time(async || try_join_all(senders.iter_mut().map(run)).await.map(drop)).await?;
    show("exec `true`", one.clone());
    show(&format!("  {COMMANDS} at once"), all.clone());
    compare("once", &mut all, &mut one);
    Ok(())
}

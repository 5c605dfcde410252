//! Benchmarks of the frame codec: through reader and writer, over memory.

use std::collections::BTreeMap;
use std::hint::black_box;

use bhatti_proto::{ExecRequest, FrameReader, FrameType, FrameWriter, encode};
use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use futures_util::FutureExt;
use tokio::runtime::{Builder, Runtime};

const KIB: usize = 1024;

/// Returns the value of a future that never waits: memory is always ready.
fn at_once<T>(future: impl Future<Output = T>) -> T {
    future.now_or_never().expect("memory is always ready")
}

fn runtime() -> Runtime {
    Builder::new_current_thread().build().expect("a runtime can be built")
}

fn write(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("frame write");
    for kib in [1, 8, 32] {
        let payload = vec![7; kib * KIB];
        group.throughput(Throughput::Bytes(payload.len() as u64));
        group.bench_function(format!("{kib} KiB"), |bencher| {
            let mut writer = FrameWriter::new(Vec::with_capacity(64 * KIB));
            bencher.iter(|| {
                writer.get_mut().clear();
                at_once(writer.send(FrameType::STDOUT, black_box(&payload)))
                    .expect("a write to memory succeeds");
            });
        });
    }
    group.finish();
}

fn read(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("frame read");
    for kib in [1, 32] {
        let mut bytes = Vec::new();
        encode(&mut bytes, FrameType::STDOUT, &vec![7; kib * KIB]).expect("the payload fits");
        group.throughput(Throughput::Bytes((kib * KIB) as u64));
        group.bench_function(format!("{kib} KiB"), |bencher| {
            bencher.iter(|| {
                let mut reader = FrameReader::new(black_box(&bytes[..]));
                at_once(reader.next()).expect("the buffer holds a frame")
            });
        });
    }
    group.finish();
}

/// Sends one frame there and back through a pipe in memory, between two tasks.
fn round_trip(criterion: &mut Criterion) {
    let runtime = runtime();
    criterion.bench_function("frame round trip 1 KiB", |bencher| {
        let (near, far) = tokio::io::duplex(64 * KIB);
        let (from, to) = tokio::io::split(far);
        let echo = runtime.spawn(async move {
            let (mut reader, mut writer) = (FrameReader::new(from), FrameWriter::new(to));
            while let Ok(Some(frame)) = reader.next().await {
                if writer.send(frame.frame_type, &frame.payload).await.is_err() {
                    return;
                }
            }
        });
        let (from, to) = tokio::io::split(near);
        let (mut reader, mut writer) = (FrameReader::new(from), FrameWriter::new(to));
        let payload = vec![7; KIB];
        bencher.iter(|| {
            runtime.block_on(async {
                writer.send(FrameType::STDOUT, &payload).await.expect("the pipe accepts the frame");
                reader.next().await.expect("the echo arrives")
            })
        });
        echo.abort();
    });
}

fn json(criterion: &mut Criterion) {
    let request = ExecRequest {
        argv: ["sh", "-c", "echo hello"].map(str::to_owned).to_vec(),
        env: BTreeMap::from([("A".to_owned(), "1".to_owned()), ("B".to_owned(), "2".to_owned())]),
        ..ExecRequest::default()
    };
    criterion.bench_function("JSON message encode", |bencher| {
        let mut writer = FrameWriter::new(Vec::with_capacity(KIB));
        bencher.iter(|| {
            writer.get_mut().clear();
            at_once(writer.send_json(FrameType::EXEC_REQ, black_box(&request)))
                .expect("a write to memory succeeds");
        });
    });
}

criterion_group!(benches, write, read, round_trip, json);
criterion_main!(benches);

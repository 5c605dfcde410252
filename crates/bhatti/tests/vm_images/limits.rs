//! Images with as much of something as an image may have, or more.

use std::io::Write;

use bhatti_api::Operation;
use bhatti_testkit::registry::{Layer, busybox};
use bhatti_testkit::{Feature, needs, peak_resident_mib, reset_peak, run};
use flate2::Compression;
use flate2::write::GzEncoder;
use serde_json::json;
use tar::{Builder, EntryType, Header};

use crate::{Place, image_of, tar, text};

/// The most layers that Docker makes.
const LAYERS: usize = 127;

fn gzip(content: &[u8]) -> Vec<u8> {
    let mut encoder = GzEncoder::new(Vec::new(), Compression::best());
    encoder.write_all(content).unwrap();
    encoder.finish().unwrap()
}

/// Bytes that cannot be compressed.
fn noise(length: usize) -> Vec<u8> {
    let mut state = 1_u64;
    let next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_le_bytes()
    };
    std::iter::repeat_with(next).flatten().take(length).collect()
}

#[tokio::test]
async fn image_of_127_layers_is_pulled_with_little_memory_and_runs() {
    let place = Place::new().await;
    let large = noise(100 << 20);
    let mut layers = vec![busybox(&[("large", 0o644, &large), ("count", 0o644, b"0")])];
    while layers.len() < LAYERS {
        let number = layers.len().to_string();
        let (own, gone) = (format!("of/{number}"), format!("of/.wh.{}", layers.len() - 1));
        let count = ("count", 0o644, number.as_bytes());
        layers.push(Layer::gzip(&tar(&[count, (&own, 0o644, b""), (&gone, 0o644, b"")])));
    }
    place.registry.push("layers:1", &layers, &json!({})).await;
    let pid = place.daemon.pid();
    reset_peak(pid);
    let before = peak_resident_mib(pid);

    let pulled = place.pull_as(place.client(), "layers:1").await;

    assert_eq!(pulled.status, "done", "{pulled:?}");
    let grown = peak_resident_mib(pid).saturating_sub(before);
    assert!(grown <= 32, "the daemon has grown by {grown} MiB");
    if needs(Feature::OwnKernel) {
        let client = place.client();
        let sandbox = client.create(&image_of(&place.reference("layers:1"))).await.unwrap();
        let seen = ["sh", "-c", "cat count; ls of; busybox wc -c <large"];
        let ran = run(client, &sandbox.name, &seen).await.unwrap();
        assert_eq!(text(&ran.stdout), format!("126126\n{}\n", 100 << 20));
        client.destroy(&sandbox.name).await.unwrap();
    }
}

/// Pulls an image with this layer as a user who may have 1 GiB, and returns why that failed.
async fn refusal(place: &Place, layer: Layer) -> String {
    let user = place.user("bounded", Some(1024)).await;
    place.registry.push("bad/app:1", &[layer], &json!({})).await;
    let Operation { status, error, .. } = place.pull_as(&user, "bad/app:1").await;
    assert_eq!(status, "failed");
    assert_eq!((place.builds(), place.built()), (Vec::new(), Vec::new()));
    error.unwrap().error
}

#[tokio::test]
async fn ten_gibibytes_of_zeros_are_refused() {
    const FILE: usize = 256 << 20;
    let place = Place::new().await;
    let zeros = gzip(&vec![0; FILE / 8]);
    let mut layer = Vec::new();
    for number in 0..40 {
        let mut header = Header::new_ustar();
        header.set_path(format!("zeros{number}")).unwrap();
        header.set_size(FILE as u64);
        header.set_cksum();
        layer.extend(gzip(header.as_bytes()));
        layer.extend(zeros.repeat(8));
    }
    assert!(layer.len() < 20 << 20);

    let said = refusal(&place, Layer::plain(layer)).await;

    assert!(said.contains("bytes in its files"), "{said}");
}

#[tokio::test]
async fn two_million_files_are_refused() {
    let place = Place::new().await;
    let mut layer = Builder::new(GzEncoder::new(Vec::new(), Compression::fast()));
    for number in 0..2_000_000 {
        let mut header = Header::new_ustar();
        header.set_entry_type(EntryType::Regular);
        header.set_path(format!("{}/{number}", number / 10_000)).unwrap();
        header.set_size(0);
        header.set_cksum();
        layer.append(&header, &b""[..]).unwrap();
    }
    let layer = layer.into_inner().unwrap().finish().unwrap();

    let said = refusal(&place, Layer::plain(layer)).await;

    assert!(said.contains("the image has more than 1000000 files"), "{said}");
}

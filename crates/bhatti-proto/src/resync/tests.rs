use proptest::prelude::*;
use tokio::io::duplex;

use super::*;

const HELLO: Hello = Hello { generation: GENERATION, epoch: [ESCAPE; 16] };

/// Decodes `wire` in pieces as the guest does, and returns the data and hellos in order.
fn decoded(wire: &[u8], piece: usize) -> (Vec<u8>, Vec<Hello>) {
    let mut decoder = Decoder::default();
    let (mut data, mut hellos) = (BytesMut::new(), Vec::new());
    for mut part in wire.chunks(piece) {
        while let Some(hello) = decoder.decode(&mut part, &mut data) {
            data.clear();
            hellos.push(hello);
        }
    }
    (data.to_vec(), hellos)
}

#[test]
fn hello_made_of_escapes_arrives() {
    assert_eq!(decoded(&HELLO.encode(), 1), (vec![], vec![HELLO]));
}

#[test]
fn hello_inside_a_broken_hello_arrives() {
    let whole = HELLO.encode();
    for end in 0..whole.len() {
        let wire = [&whole[..end], &whole].concat();

        assert_eq!(decoded(&wire, 3), (vec![], vec![HELLO]), "broken after {end} bytes");
    }
}

#[tokio::test]
async fn host_discards_all_bytes_before_its_ack() {
    let epoch = [3; 16];
    let (near, mut far) = duplex(1 << 16);
    let stale_ack = Hello { generation: GENERATION, epoch: [4; 16] }.encode_ack();
    let ack = Hello { generation: GENERATION, epoch }.encode_ack();
    far.write_all(
        &[b"half a frame".as_slice(), &stale_ack, &ACK_MAGIC[..5], &ack, b"fresh"].concat(),
    )
    .await
    .unwrap();

    let mut stream = greet(near, epoch).await.unwrap();

    let mut fresh = [0; 5];
    stream.read_exact(&mut fresh).await.unwrap();
    assert_eq!(&fresh, b"fresh");
}

#[tokio::test]
async fn host_refuses_an_agent_of_another_generation() {
    let (near, mut far) = duplex(1 << 16);
    far.write_all(&Hello { generation: 9, epoch: [3; 16] }.encode_ack()).await.unwrap();

    let error = greet(near, [3; 16]).await.unwrap_err();

    assert!(matches!(error, GreetError::Generation { generation: 9 }), "{error}");
}

#[tokio::test]
async fn host_fails_on_endless_noise() {
    let (near, mut far) = duplex(1 << 16);
    let noise = tokio::spawn(async move { while far.write_all(&[0xf7; 4096]).await.is_ok() {} });

    let error = greet(near, [3; 16]).await.unwrap_err();

    assert!(matches!(error, GreetError::Noise), "{error}");
    noise.await.unwrap();
}

#[tokio::test]
async fn channel_that_closes_before_the_ack_is_an_error() {
    let (near, far) = duplex(1 << 16);
    drop(far);

    assert!(matches!(greet(near, [3; 16]).await, Err(GreetError::Io(_))));
}

proptest! {
    #[test]
    fn any_data_survives_any_split(
        data in prop::collection::vec(prop_oneof![any::<u8>(), Just(ESCAPE), Just(ESCAPED_HELLO)], 0..600),
        piece in 1usize..50,
    ) {
        let mut wire = Vec::new();
        escape(&data, &mut wire);
        prop_assert_eq!(decoded(&wire, piece), (data, vec![]));
    }

    #[test]
    fn hello_is_found_after_any_cut_of_any_data(
        old in prop::collection::vec(prop_oneof![any::<u8>(), Just(ESCAPE)], 0..300),
        cut in 0usize..400,
        new: Vec<u8>,
        epoch: Epoch,
        piece in 1usize..50,
    ) {
        let hello = Hello { generation: GENERATION, epoch };
        let mut wire = Vec::new();
        escape(&old, &mut wire);
        wire.truncate(cut);
        wire.extend_from_slice(&hello.encode());
        escape(&new, &mut wire);
        prop_assert_eq!(decoded(&wire, piece), (new, vec![hello]));
    }

    #[test]
    fn no_noise_makes_the_decoder_panic(noise: Vec<u8>, piece in 1usize..50) {
        decoded(&noise, piece);
    }

    #[test]
    fn host_stream_writes_what_the_guest_decodes(
        data in prop::collection::vec(prop_oneof![any::<u8>(), Just(ESCAPE)], 0..4000),
        room in 1usize..100,
    ) {
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        let wire = runtime.block_on(async {
            let (near, mut far) = duplex(room);
            let stream = HostStream { inner: near, received: BytesMut::new(), escaped: BytesMut::new() };
            let sent = data.clone();
            let writing = tokio::spawn(async move {
                let mut stream = stream;
                stream.write_all(&sent).await.unwrap();
                stream.flush().await.unwrap();
            });
            let mut wire = Vec::new();
            far.read_to_end(&mut wire).await.unwrap();
            writing.await.unwrap();
            wire
        });
        prop_assert_eq!(decoded(&wire, 64), (data, vec![]));
    }
}

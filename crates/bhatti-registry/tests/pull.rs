//! Pulls from Debian's `docker-registry` on loopback: directly, with TLS and passwords, and through
//! a relay that misbehaves.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on panics")]

#[path = "pull/relay.rs"]
mod relay;

use std::fs;
use std::sync::atomic::{AtomicU64, Ordering};

use bhatti_registry::{
    BlobAccess, Blobs, Config, ConnectError, Credentials, HttpError, Progress, Pushed, Registries,
    Registry, RegistryError, RemoteImage,
};
use bhatti_testkit::registry::{Layer, RealRegistry, unused_server};
use rustls::pki_types::CertificateDer;
use serde_json::json;
use tempfile::TempDir;

use relay::{Answer, Relay};

/// Size of the image's layer, in bytes.
const LAYER_BYTES: u64 = 3 << 20;

/// Pushes `team/app:1`. What its layer contains does not matter to a registry.
async fn with_image(registry: RealRegistry) -> RealRegistry {
    let number = |at: u64| u32::try_from(at).unwrap().wrapping_mul(2_654_435_761);
    let content = (0..LAYER_BYTES / 4).flat_map(|at| number(at).to_le_bytes()).collect();
    registry.push("team/app:1", &[Layer::plain(content)], &json!({})).await;
    registry
}

/// Counts what a download reports.
#[derive(Default)]
struct Counter(AtomicU64);

impl Progress for Counter {
    fn add(&self, bytes: u64) {
        self.0.fetch_add(bytes, Ordering::SeqCst);
    }

    fn remove(&self, bytes: u64) {
        self.0.fetch_sub(bytes, Ordering::SeqCst);
    }
}

/// Settings that allow this server, without TLS.
fn plain(server: &str) -> Config {
    let settings = Registry { plain_http: true, private: true, mirrors: Vec::new() };
    Config { registries: [(server.to_owned(), settings)].into(), authorities: Vec::new() }
}

/// A pull of an image from a server into a new directory.
struct Pull {
    registries: Registries,
    server: String,
    credentials: Option<Credentials>,
    directory: TempDir,
    blobs: Blobs,
    counter: Counter,
}

impl Pull {
    fn new(server: &str, config: Config) -> Self {
        let directory = tempfile::tempdir().unwrap();
        Self {
            registries: Registries::new(config).unwrap(),
            server: server.to_owned(),
            credentials: None,
            blobs: Blobs::new(directory.path()),
            directory,
            counter: Counter::default(),
        }
    }

    fn with_password(self, password: &str) -> Self {
        let credentials = Credentials { user: "tester".to_owned(), password: password.to_owned() };
        Self { credentials: Some(credentials), ..self }
    }

    /// Downloads an image with all its blobs.
    async fn run(&self, name: &str) -> Result<RemoteImage, RegistryError> {
        let reference = format!("{}/{name}", self.server).parse().unwrap();
        let credentials = self.credentials.as_ref();
        let image = self.registries.find(&reference, credentials).await?;
        self.registries.config(&reference, credentials, &image.config).await?;
        for layer in &image.layers {
            let (registries, progress) = (&self.registries, &self.counter);
            let access = BlobAccess { user: "user".to_owned(), ..BlobAccess::default() };
            let wanted = (&access, layer);
            self.blobs.download(registries, &reference, credentials, wanted, progress).await?;
        }
        Ok(image)
    }

    /// Sizes of the whole and of the partial blobs.
    fn files(&self) -> [Vec<u64>; 2] {
        ["sha256", "partial"].map(|directory| {
            let entries = fs::read_dir(self.directory.path().join(directory));
            let entries = entries.into_iter().flatten();
            entries.map(|entry| entry.unwrap().metadata().unwrap().len()).collect()
        })
    }
}

#[tokio::test]
async fn image_is_found_by_tag_and_digest_and_downloaded_once() {
    let registry = with_image(RealRegistry::start().await).await;
    let pull = Pull::new(&registry.server, plain(&registry.server));

    let image = pull.run("team/app:1").await.unwrap();

    assert_eq!(pull.files(), [vec![LAYER_BYTES], vec![]]);
    assert_eq!(pull.counter.0.load(Ordering::SeqCst), LAYER_BYTES);
    let by_digest = pull.run(&format!("team/app@{}", image.digest)).await.unwrap();
    assert_eq!(by_digest, image);
    let missing = pull.run("team/app:2").await.unwrap_err();
    assert!(matches!(missing, RegistryError::NotFound(_)), "{missing}");
    assert!(missing.to_string().contains("team/app"), "{missing}");
}

#[tokio::test]
async fn image_is_pushed_and_only_what_is_missing_is_sent() {
    let registry = with_image(RealRegistry::start_private().await).await;
    let settings = Registry { private: true, ..Registry::default() };
    let config = || Config {
        registries: [(registry.server.clone(), settings.clone())].into(),
        authorities: vec![CertificateDer::from(registry.authority.clone())],
    };
    let pull = Pull::new(&registry.server, config()).with_password("secret");
    let image = pull.run("team/app:1").await.unwrap();
    let reference = format!("{}/team/app:1", registry.server).parse().unwrap();
    let credentials = pull.credentials.as_ref();
    let written = pull.registries.config(&reference, credentials, &image.config).await.unwrap();
    pull.blobs.keep(&written).unwrap();
    let parts: Vec<_> = [image.config.clone()].into_iter().chain(image.layers.clone()).collect();
    let media_type = "application/vnd.oci.image.manifest.v1+json";
    let pushed = Pushed { manifest: &image.manifest, media_type, parts: &parts };
    let push = async |name: &str, credentials: Option<&Credentials>| {
        let reference = format!("{}/{name}", registry.server).parse().unwrap();
        let (registries, blobs) = (&pull.registries, &pull.blobs);
        registries.push(&reference, credentials, blobs, pushed, &[]).await
    };

    let refused = push("other/app:2", None).await.unwrap_err();
    assert!(matches!(refused, RegistryError::Denied { .. }), "{refused}");
    push("other/app:2", credentials).await.unwrap();

    let again = Pull::new(&registry.server, config()).with_password("secret");
    assert_eq!(again.run("other/app:2").await.unwrap(), image);
    // The registry has all blobs, so their files are not needed.
    fs::remove_dir_all(pull.directory.path().join("sha256")).unwrap();
    push("other/app:3", credentials).await.unwrap();
    push("third/app:1", credentials).await.unwrap_err();
    assert!(matches!(again.run("third/app:1").await, Err(RegistryError::NotFound(_))));
}

#[tokio::test]
async fn password_and_certificate_are_needed() {
    let registry = with_image(RealRegistry::start_private().await).await;
    let settings = Registry { private: true, ..Registry::default() };
    let trusting = || Config {
        registries: [(registry.server.clone(), settings.clone())].into(),
        authorities: vec![CertificateDer::from(registry.authority.clone())],
    };

    for refused in [
        Pull::new(&registry.server, trusting()),
        Pull::new(&registry.server, trusting()).with_password("wrong"),
    ] {
        let error = refused.run("team/app:1").await.unwrap_err();
        assert!(matches!(error, RegistryError::Denied { .. }), "{error}");
    }
    let pull = Pull::new(&registry.server, trusting()).with_password("secret");
    pull.run("team/app:1").await.unwrap();

    let untrusting = Config { authorities: Vec::new(), ..trusting() };
    let error = Pull::new(&registry.server, untrusting).run("team/app:1").await.unwrap_err();
    assert!(error.to_string().contains("certificate"), "{error}");
    assert!(!error.is_transient(), "{error}");
}

#[tokio::test]
async fn addresses_of_this_machine_and_requests_without_tls_need_the_operators_consent() {
    let registry = with_image(RealRegistry::start().await).await;
    let error = Pull::new(&registry.server, Config::default()).run("a:1").await.unwrap_err();
    assert!(error.to_string().contains("address 127.0.0.1"), "{error}");

    let relay = Relay::start(&registry.server, |_| {
        Answer::redirect("http://169.254.169.254/latest/meta-data/")
    });
    let error = Pull::new(&relay.server, plain(&relay.server)).run("a:1").await.unwrap_err();
    assert!(
        matches!(error, RegistryError::Http(HttpError::Connect(ConnectError::NotEncrypted(_)))),
        "{error}"
    );
    let relay = Relay::start(&registry.server, |_| Answer::redirect("https://169.254.169.254/"));
    let error = Pull::new(&relay.server, plain(&relay.server)).run("a:1").await.unwrap_err();
    assert!(error.to_string().contains("169.254.169.254, which is not on the Internet"), "{error}");

    let relay = Relay::start(&registry.server, |_| {
        Answer::status(401, r#"WWW-Authenticate: Bearer realm="https://[fd00:ec2::254]/token""#)
    });
    let error = Pull::new(&relay.server, plain(&relay.server)).run("a:1").await.unwrap_err();
    assert!(error.to_string().contains("fd00:ec2::254, which is not on the Internet"), "{error}");
}

#[tokio::test]
async fn dropped_connections_are_continued() {
    let registry = with_image(RealRegistry::start().await).await;
    let relay = Relay::start(&registry.server, |request| match request.is_blob() {
        true => Answer::Cut(400_000),
        false => Answer::Relay,
    });
    let pull = Pull::new(&relay.server, plain(&relay.server));

    pull.run("team/app:1").await.unwrap();

    assert_eq!(pull.files(), [vec![LAYER_BYTES], vec![]]);
    assert_eq!(pull.counter.0.load(Ordering::SeqCst), LAYER_BYTES);
    let sent = relay.sent();
    assert!(sent < LAYER_BYTES * 11 / 10, "{sent} bytes were sent for {LAYER_BYTES}");
}

#[tokio::test]
async fn busy_registry_is_asked_again() {
    let registry = with_image(RealRegistry::start().await).await;
    let relay = Relay::start(&registry.server, |request| match request.number {
        0 => Answer::status(429, "Retry-After: 0"),
        2 => Answer::status(503, ""),
        4 => Answer::Cut(0),
        _ => Answer::Relay,
    });
    Pull::new(&relay.server, plain(&relay.server)).run("team/app:1").await.unwrap();
}

#[tokio::test]
async fn content_with_another_digest_is_refused_and_does_not_stay() {
    let registry = with_image(RealRegistry::start().await).await;
    let relay = Relay::start(&registry.server, |request| match request.is_layer() {
        true => Answer::Flip(100_000),
        false => Answer::Relay,
    });
    let pull = Pull::new(&relay.server, plain(&relay.server));

    let error = pull.run("team/app:1").await.unwrap_err();

    assert!(matches!(error, RegistryError::WrongContent { .. }), "{error}");
    assert_eq!(pull.files(), [Vec::<u64>::new(), vec![]]);

    let relay = Relay::start(&registry.server, |request| match request.is_blob() {
        false => Answer::Flip(500),
        true => Answer::Relay,
    });
    let error = Pull::new(&relay.server, plain(&relay.server)).run("team/app:1").await.unwrap_err();
    assert!(matches!(error, RegistryError::WrongContent { .. }), "{error}");
}

#[tokio::test]
async fn wrong_content_once_is_replaced() {
    let registry = with_image(RealRegistry::start().await).await;
    let relay = Relay::start(&registry.server, |request| match request.number {
        2 => Answer::Flip(100_000),
        _ => Answer::Relay,
    });
    let pull = Pull::new(&relay.server, plain(&relay.server));
    pull.run("team/app:1").await.unwrap();
    assert_eq!(pull.counter.0.load(Ordering::SeqCst), LAYER_BYTES);
}

#[tokio::test]
async fn token_that_expires_is_replaced() {
    let registry = with_image(RealRegistry::start().await).await;
    // The relay issues tokens, each for two requests.
    let relay = Relay::with_tokens(&registry.server, 2);
    let pull = Pull::new(&relay.server, plain(&relay.server));
    for _ in 0..3 {
        pull.run("team/app:1").await.unwrap();
    }
    assert!(relay.tokens() >= 3, "{} tokens", relay.tokens());
}

#[tokio::test]
async fn descriptions_without_an_end_are_cut_off() {
    let registry = with_image(RealRegistry::start().await).await;
    let relay = Relay::start(&registry.server, |_| Answer::Endless);
    let error = Pull::new(&relay.server, plain(&relay.server)).run("team/app:1").await.unwrap_err();
    assert!(matches!(error, RegistryError::Http(HttpError::TooLong { .. })), "{error}");
    assert!(relay.sent() < 32 << 20, "{}", relay.sent());
}

#[tokio::test]
async fn mirror_is_asked_first_and_the_registry_after_it() {
    let registry = with_image(RealRegistry::start().await).await;
    let broken = Relay::start(&registry.server, |_| Answer::status(500, ""));
    let mirror = Relay::start(&registry.server, |_| Answer::Relay);
    let mut config = plain(&registry.server);
    for server in [&broken.server, &mirror.server] {
        config.registries.extend(plain(server).registries);
    }
    // The registry's own server cannot be reached: nothing listens there.
    let gone = unused_server();
    let mirrors = vec![broken.server.clone(), mirror.server.clone()];
    config.registries.insert(gone.clone(), Registry { mirrors, ..Registry::default() });

    Pull::new(&gone, config.clone()).run("team/app:1").await.unwrap();
    assert!(mirror.sent() > LAYER_BYTES);

    let mirrors = vec![broken.server.clone()];
    let own = Registry { mirrors, plain_http: true, private: true };
    config.registries.insert(registry.server.clone(), own);
    Pull::new(&registry.server, config).run("team/app:1").await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn login_at_a_silent_registry_fails_after_thirty_seconds() {
    // It accepts connections, and never answers.
    let silent = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let server = silent.local_addr().unwrap().to_string();
    let registries = Registries::new(plain(&server)).unwrap();
    let login = Credentials { user: "tester".to_owned(), password: "secret".to_owned() };
    let begun = tokio::time::Instant::now();

    let error = registries.check_login(&server, &login).await.unwrap_err();

    assert!(error.to_string().contains("timed out"), "{error}");
    assert_eq!(begun.elapsed().as_secs(), 30);
}

#[tokio::test]
async fn canceled_download_is_continued_and_two_at_once_are_one() {
    let registry = with_image(RealRegistry::start().await).await;
    let relay = Relay::start(&registry.server, |request| match request.number {
        // The third request, the first one for the layer, stops in the middle.
        2 => Answer::Hang(700_000),
        _ => Answer::Relay,
    });
    let pull = Pull::new(&relay.server, plain(&relay.server));
    tokio::select! {
        result = pull.run("team/app:1") => panic!("{result:?}"),
        () = relay.hangs() => {}
    }
    let [_, partial] = pull.files();
    assert!(partial[0] > 0 && partial[0] < LAYER_BYTES, "{partial:?}");
    let before = relay.sent();

    let (first, second) = tokio::join!(pull.run("team/app:1"), pull.run("team/app:1"));

    first.unwrap();
    second.unwrap();
    assert_eq!(pull.files(), [vec![LAYER_BYTES], vec![]]);
    let sent = relay.sent() - before;
    assert!(sent < LAYER_BYTES - partial[0] + 100_000, "{sent} bytes for the rest");
}

//! Settings that the host sends and that apply in test mode: token, environment, files, init.

use bhatti_agent::{CallError, ExecEvent};
use bhatti_proto::{Applied, ConfigFile, ErrorKind, FrameType, GuestConfig, Identity};

use crate::agent::Agent;

fn refused_with(error: &CallError, kind: ErrorKind) -> bool {
    matches!(error, CallError::Agent(agent) if agent.kind == kind)
}

#[tokio::test]
async fn configured_token_is_required_on_every_connection() {
    let agent = Agent::start().await;
    agent
        .client
        .configure(&GuestConfig { token: "secret".into(), ..GuestConfig::default() })
        .await
        .unwrap();

    let known = agent.client.with_token(b"secret");
    assert!(known.list_sessions().await.unwrap().is_empty());
    for client in
        [agent.client.clone(), agent.client.with_token(b"secreT"), agent.client.with_token(b"")]
    {
        let error = client.list_sessions().await.unwrap_err();
        assert!(matches!(&error, CallError::Refused(words) if words == "auth required"), "{error}");
    }
    let mut raw = agent.raw_forward().await;
    raw.send(FrameType::FWD_REQ, r#"{"port":1}"#).await;
    assert_eq!(raw.text().await, (FrameType::ERROR, "auth required".to_owned()));
}

#[tokio::test]
async fn configuration_sets_environment_files_and_init() {
    let agent = Agent::start().await;
    let (secret, path) = (agent.path("secret"), agent.path("secret").clone());
    let file = ConfigFile { content: "aGVsbG8=".into(), mode: "0600".into() };
    let config = GuestConfig {
        env: [("MINE".to_owned(), "a b=c\n'\"".to_owned()), ("HOME".to_owned(), "/h".to_owned())]
            .into(),
        files: [(path, file)].into(),
        init: "echo init runs with $MINE; read x".into(),
        ..GuestConfig::default()
    };

    agent.client.configure(&config).await.unwrap();

    assert_eq!(
        agent.run_shell(r#"printf '%s|%s' "$MINE" "$HOME""#).await.stdout(),
        "a b=c\n'\"|/h"
    );
    assert_eq!(std::fs::read(secret).unwrap(), b"hello");
    let (info, _input, mut output) = agent.client.attach("init", None).await.unwrap();
    assert!(info.running && info.tty);
    let ExecEvent::Stdout(printed) = output.next().await.unwrap() else { panic!("no output") };
    assert!(printed.starts_with(b"init runs with a b=c"), "{printed:?}");
    let again = agent.client.configure(&config).await.unwrap_err();
    assert!(
        matches!(&again, CallError::Refused(_)) || refused_with(&again, ErrorKind::AlreadyExists),
        "{again}"
    );
}

#[tokio::test]
async fn bad_configuration_is_refused_and_may_be_sent_again() {
    let agent = Agent::start().await;
    let file = ConfigFile { content: "no base64!".into(), mode: String::new() };
    let bad = GuestConfig { files: [(agent.path("x"), file)].into(), ..GuestConfig::default() };

    assert!(agent.client.configure(&bad).await.is_err());
    assert!(!std::fs::exists(agent.path("x")).unwrap());
    agent.client.configure(&GuestConfig::default()).await.unwrap();
}

#[tokio::test]
async fn identity_replaces_token_environment_and_files() {
    let agent = Agent::start().await;
    let env = |value: &str| {
        [("WHO".to_owned(), value.to_owned()), (format!("ONLY_{value}"), String::new())].into()
    };
    let parent = GuestConfig { token: "old".into(), env: env("parent"), ..GuestConfig::default() };
    agent.client.configure(&parent).await.unwrap();
    let file = ConfigFile { content: "bmV3".into(), mode: String::new() };
    let config = GuestConfig {
        token: "new".into(),
        env: env("fork"),
        files: [(agent.path("mine"), file)].into(),
        ..GuestConfig::default()
    };

    let identity = Identity {
        entropy: "AAAA".into(),
        machine_id: "0".repeat(32),
        config,
        ..Identity::default()
    };
    let report = agent.client.with_token(b"old").assume_identity(&identity).await.unwrap();

    assert_eq!(
        (report.token, report.environment, report.files),
        (Applied::Done, Applied::Done, Applied::Done)
    );
    // In test mode the agent does not change the machine.
    assert_eq!(
        (report.rng, report.wall_clock, report.hostname),
        (Applied::Nothing, Applied::Nothing, Applied::Nothing)
    );
    assert!(agent.client.with_token(b"old").list_sessions().await.is_err());
    let known = agent.client.with_token(b"new");
    let (_, stdout, _) =
        known.run(crate::agent::shell("echo $WHO; env | grep ONLY")).await.unwrap();
    assert_eq!(String::from_utf8(stdout).unwrap(), "fork\nONLY_fork=\n");
    assert_eq!(std::fs::read(agent.path("mine")).unwrap(), b"new");
}

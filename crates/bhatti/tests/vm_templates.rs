//! Templates that are built from steps.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on panics")]

use std::fs;

use bhatti_api::{
    BuildTemplate, CopyFiles, CreateSandbox, CreateUser, ErrorCode, Operation, TemplateStep,
};
use bhatti_client::{Client, ClientError, Upload};
use bhatti_testkit::{Feature, LIMIT, Serve, TestDaemon, engine_has, needs, shell};
use tokio::time::timeout;

/// Makes an archive of files.
fn archive(files: &[(&str, &str)]) -> Upload {
    let mut archive = tar::Builder::new(Vec::new());
    for (name, content) in files {
        let mut header = tar::Header::new_gnu();
        header.set_mode(0o755);
        header.set_size(content.len() as u64);
        archive.append_data(&mut header, name, content.as_bytes()).unwrap();
    }
    Upload::new(std::io::Cursor::new(archive.into_inner().unwrap()), None)
}

/// Builds a template, and returns the operation and its log.
async fn build(
    client: &Client,
    request: &BuildTemplate,
    files: &[(&str, &str)],
) -> (Operation, String) {
    let begun = client.build_template(request, archive(files)).await.unwrap();
    let mut log = client.operation_log(&begun.id, 0).await.unwrap();
    let mut said = Vec::new();
    while let Some(piece) = timeout(LIMIT, log.next()).await.unwrap().unwrap() {
        said.extend(piece);
    }
    let ended = client.operation(&begun.id, 60).await.unwrap();
    (ended, String::from_utf8_lossy(&said).into_owned())
}

async fn built(client: &Client, request: &BuildTemplate, files: &[(&str, &str)]) -> String {
    let (ended, said) = build(client, request, files).await;
    assert_eq!(ended.status, "done", "{:?}: {said}", ended.error);
    said
}

fn of_template(name: &str) -> CreateSandbox {
    CreateSandbox { template: Some(name.to_owned()), ..CreateSandbox::default() }
}

fn refusal(error: ClientError) -> (ErrorCode, String) {
    match error {
        ClientError::Refused(body) => (body.code, body.error),
        error => panic!("{error}"),
    }
}

fn run(command: &str) -> TemplateStep {
    TemplateStep::Run(command.to_owned())
}

/// Serves what the file that it was started with says.
const SERVER: &str = "import http.server, os, sys
text = open(sys.argv[1]).read() + os.environ['GREETING'] + '\\n'
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(text.encode())
    def log_message(self, *arguments):
        pass
http.server.HTTPServer(('127.0.0.1', 8000), Handler).serve_forever()
";

fn server() -> BuildTemplate {
    let copy = |from: &str, to: &str| {
        TemplateStep::Copy(CopyFiles { from: from.to_owned(), to: to.to_owned(), user: None })
    };
    BuildTemplate {
        name: "web".to_owned(),
        steps: vec![
            run(r"echo first | tr '\0' '\n'; date +%N | sudo tee /made >/dev/null"),
            TemplateStep::Env([("GREETING".to_owned(), "hello".to_owned())].into()),
            TemplateStep::Workdir("/srv/app".to_owned()),
            copy("app", "/srv/app"),
            run("echo $GREETING from $(pwd) as $(id -un)"),
        ],
        start: Some("exec python3 server.py text".to_owned()),
        ready: Some("curl -sf http://127.0.0.1:8000/".to_owned()),
        ..BuildTemplate::default()
    }
}

#[tokio::test]
async fn sandboxes_of_a_built_template_begin_with_its_running_command() {
    if !needs(Feature::SavedMemory) {
        return;
    }
    let daemon = TestDaemon::start().await;
    let client = &daemon.client;
    let files = [("app/server.py", SERVER), ("app/text", "one\n"), ("other", "x")];

    let said = built(client, &server(), &files).await;

    assert!(said.contains("[1/5] RUN echo first | tr"), "{said}");
    assert!(said.contains("hello from /srv/app as user\n"), "{said}");
    assert!(!said.contains("(cached)"), "{said}");
    let template = client.inspect_template("web").await.unwrap();
    assert!(template.is_warm);
    assert_eq!(client.list_snapshots().await.unwrap(), []);
    let sandboxes = client.list().await.unwrap();
    assert!(sandboxes.is_empty(), "{sandboxes:?}");
    let one = client.create(&of_template("web")).await.unwrap();
    // The server runs from the beginning, so no retry is needed.
    let said =
        shell(client, &one.name, "curl -s http://127.0.0.1:8000/; pwd; echo $GREETING").await;
    assert_eq!(said, "one\nhello\n/srv/app\nhello\n");
    let made = shell(client, &one.name, "cat /made").await;

    // Another file that no step copies changes nothing.
    let files = [("app/server.py", SERVER), ("app/text", "one\n"), ("other", "y")];
    let said = built(client, &server(), &files).await;
    assert_eq!(said.matches("(cached)").count(), 5, "{said}");
    // Only what follows the copy runs again.
    let files = [("app/server.py", SERVER), ("app/text", "two\n")];
    let said = built(client, &server(), &files).await;
    assert_eq!(said.matches("(cached)").count(), 3, "{said}");
    let two = client.create(&of_template("web")).await.unwrap();
    let said = shell(client, &two.name, "curl -s http://127.0.0.1:8000/; cat /made").await;
    assert_eq!(said, format!("two\nhello\n{made}"));
    // The sandbox of the first template is as before.
    let said = shell(client, &one.name, "curl -s http://127.0.0.1:8000/").await;
    assert_eq!(said, "one\nhello\n");

    // A template can begin with another one, and its processes.
    let child = BuildTemplate {
        name: "child".to_owned(),
        template: Some("web".to_owned()),
        steps: vec![run("curl -s http://127.0.0.1:8000/ >/tmp/answer")],
        ..BuildTemplate::default()
    };
    built(client, &child, &[]).await;
    let three = client.create(&of_template("child")).await.unwrap();
    assert_eq!(shell(client, &three.name, "cat /tmp/answer").await, "two\nhello\n");

    // What the snapshot fixes cannot be changed.
    let other = CreateSandbox { memory_mb: Some(1024), ..of_template("web") };
    let (code, error) = refusal(client.create(&other).await.unwrap_err());
    assert_eq!(code, ErrorCode::BadRequest);
    assert!(error.contains("its own memory"), "{error}");
    client.delete_template("web").await.unwrap();
    client.delete_template("child").await.unwrap();
    for sandbox in [one, two, three] {
        client.destroy(&sandbox.name).await.unwrap();
    }
    // Only cached steps are left: four of the first build, two of the next, and one of the child.
    assert_eq!(snapshots(&daemon), 7);
}

/// The number of snapshots on disk.
fn snapshots(daemon: &TestDaemon) -> usize {
    fs::read_dir(daemon.data_dir().join("snapshots")).unwrap().count()
}

#[tokio::test]
async fn public_template_is_for_all_users_and_changed_by_the_admin_alone() {
    if !needs(Feature::SavedMemory) {
        return;
    }
    let config = "listen: 127.0.0.1:0\n".to_owned();
    let daemon = TestDaemon::start_with(Serve { config, ..Serve::default() }).await;
    let client = &daemon.client;
    let user = CreateUser { name: "bob".to_owned(), ..CreateUser::default() };
    let made = client.create_user(&user).await.unwrap();
    let bob = Client::http(&format!("http://{}", daemon.api_address()), &made.api_key).unwrap();
    let template = |name: &str, public| BuildTemplate {
        name: name.to_owned(),
        steps: vec![run("echo of the admin >~/file")],
        public,
        ..BuildTemplate::default()
    };
    built(client, &template("web", true), &[]).await;
    built(client, &template("own", false), &[]).await;

    let listed = bob.list_templates().await.unwrap();
    assert_eq!(
        listed.iter().map(|it| (it.name.as_str(), it.public)).collect::<Vec<_>>(),
        [("web", true)]
    );
    let one = bob.create(&of_template("web")).await.unwrap();
    assert_eq!(shell(&bob, &one.name, "cat ~/file").await, "of the admin\n");
    for refused in [
        bob.create(&of_template("own")).await.map(drop),
        bob.delete_template("own").await.map(drop),
        bob.delete_template("web").await.map(drop),
        bob.build_template(&template("mine", true), archive(&[])).await.map(drop),
    ] {
        let (code, error) = refusal(refused.unwrap_err());
        assert!(matches!(code, ErrorCode::NotFound | ErrorCode::Forbidden), "{error}");
    }
    // The user's own templates come first, and can begin with the public one.
    let child = BuildTemplate {
        template: Some("web".to_owned()),
        steps: vec![run("echo and of bob >>~/file")],
        ..template("web", false)
    };
    built(&bob, &child, &[]).await;
    let two = bob.create(&of_template("web")).await.unwrap();
    assert_eq!(shell(&bob, &two.name, "cat ~/file").await, "of the admin\nand of bob\n");

    // Sandboxes outlive the template.
    client.delete_template("web").await.unwrap();
    assert_eq!(shell(&bob, &one.name, "cat ~/file").await, "of the admin\n");
    assert_eq!(bob.list_templates().await.unwrap().len(), 1);
    bob.delete_template("web").await.unwrap();
    assert_eq!(bob.list_templates().await.unwrap(), []);
}

#[tokio::test]
async fn failed_builds_of_templates_say_why_and_leave_nothing() {
    if !needs(Feature::SavedMemory) {
        return;
    }
    let config = "listen: 127.0.0.1:0\n".to_owned();
    let mut daemon = TestDaemon::start_with(Serve { config, ..Serve::default() }).await;
    let client = daemon.client.clone();
    let template = |steps: Vec<TemplateStep>| BuildTemplate {
        name: "web".to_owned(),
        steps,
        ..BuildTemplate::default()
    };
    let copy = |from: &str, to: &str| {
        let files = CopyFiles { from: from.to_owned(), to: to.to_owned(), user: None };
        template(vec![TemplateStep::Copy(files)])
    };
    let never = BuildTemplate {
        start: Some("echo began; exit 4".to_owned()),
        ready: Some("false".to_owned()),
        ..template(Vec::new())
    };
    for (request, code, wanted) in [
        (
            template(vec![run("echo out; exit 3")]),
            ErrorCode::BuildFailed,
            "step 1 failed with exit code 3: RUN echo out; exit 3",
        ),
        (copy("none", "/x"), ErrorCode::BadRequest, "the files have no `none`"),
        (copy("../a", "/x"), ErrorCode::BadRequest, "`../a`"),
        (never, ErrorCode::BuildFailed, "ended with exit code 4"),
    ] {
        let (ended, said) = build(&client, &request, &[("a", "a")]).await;
        let error = ended.error.unwrap();
        assert_eq!((ended.status.as_str(), error.code), ("failed", code), "{said}");
        assert!(error.error.contains(wanted), "{}", error.error);
    }
    let relative = client.build_template(&copy("a", "x"), archive(&[])).await.unwrap_err();
    assert_eq!(refusal(relative).1, "`x` is not an absolute path");
    let many = template(vec![run("true"); 101]);
    let many = client.build_template(&many, archive(&[])).await.unwrap_err();
    assert_eq!(refusal(many).0, ErrorCode::BadRequest);
    assert!(client.list_templates().await.unwrap().is_empty());
    assert!(client.list().await.unwrap().is_empty());

    // A daemon that is killed leaves no sandbox and no half-made template.
    let begun = client
        .build_template(&template(vec![run("true"), run("echo slow; sleep 1000")]), archive(&[]))
        .await
        .unwrap();
    let mut log = client.operation_log(&begun.id, 0).await.unwrap();
    let mut said = Vec::new();
    while !String::from_utf8_lossy(&said).contains("\nslow\n") {
        said.extend(timeout(LIMIT, log.next()).await.unwrap().unwrap().unwrap());
    }
    daemon.kill().await;
    daemon.serve().await;
    let gone = async {
        while !client.list().await.unwrap().is_empty() {
            tokio::time::sleep(std::time::Duration::from_millis(20)).await;
        }
    };
    timeout(LIMIT, gone).await.unwrap();
    assert!(client.list_templates().await.unwrap().is_empty());

    // Cached steps do not keep a user from being deleted.
    let user = CreateUser { name: "bob".to_owned(), ..CreateUser::default() };
    let made = client.create_user(&user).await.unwrap();
    let bob = Client::http(&format!("http://{}", daemon.api_address()), &made.api_key).unwrap();
    built(&bob, &template(vec![run("true")]), &[]).await;
    bob.delete_template("web").await.unwrap();
    client.delete_user("bob").await.unwrap();
    // The admin's is the one step that ended before the daemon was killed.
    assert_eq!(snapshots(&daemon), 1);
}

#[tokio::test]
async fn templates_are_not_built_where_sandboxes_cannot_be_saved() {
    if engine_has(Feature::SavedMemory) {
        return;
    }
    let daemon = TestDaemon::start().await;
    let request = BuildTemplate { name: "web".to_owned(), ..BuildTemplate::default() };
    let refused = daemon.client.build_template(&request, archive(&[])).await.unwrap_err();
    assert_eq!(refusal(refused).0, ErrorCode::Unsupported);
}

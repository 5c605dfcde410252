//! The work of a build in its sandbox.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Seek;

use bhatti_agent::{AgentClient, ExecEvent};
use bhatti_proto::ExecRequest;
use bhatti_types::UserId;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use super::dockerfile::Dockerfile;
use super::progress::Progress;
use super::{Base, BuildRequest, BuildSandbox};
use crate::Control;
use crate::build_errors::BuildError;
use crate::operations::Operation;

/// Allows programs of steps to gain privileges, and device nodes. A container cannot change its
/// mounts.
const REMOUNT: &str = "mount -o remount,suid,dev /build";

/// Prepares the sandbox. The cache is emptied if it is nearly full, or if Buildah cannot use it.
const PREPARE: &str = r#"
mkdir -p /build/tmp /etc/containers /run/build/secrets
chmod 700 /run/build/secrets
find /build/tmp /build/context -mindepth 1 -delete 2>/dev/null || true
printf '[containers]\ndefault_ulimits = []\n' >/etc/containers/containers.conf
printf '[storage]\ndriver = "overlay"\ngraphroot = "/build/storage"\nrunroot = "/run/build/storage"\n' >/etc/containers/storage.conf
printf 'unqualified-search-registries = ["docker.io"]\n' >/etc/containers/registries.conf
used=$(df --output=pcent /build | tail -n 1 | tr -dc 0-9)
if [ "$used" -gt 75 ] || ! timeout 120 buildah rm --all >/dev/null 2>&1; then
    echo "emptying the cache of layers"
    rm -rf /build/storage
fi
"#;

/// Unpacks the context. Owners are left out: files that are copied into an image are root's.
const UNPACK: &str = "mkdir -p /build/context
tar --no-same-owner -xf /build/tmp/context -C /build/context
rm /build/tmp/context";

/// Loads an image and prints its id.
const LOAD: &str = "buildah pull --quiet oci-archive:/build/tmp/base
rm /build/tmp/base";

/// Sends the image, uncompressed, to standard output.
const SEND: &str = "buildah push --quiet localhost/result docker-archive:/dev/stdout";

/// Bytes of what a tool says that are kept for an error.
const SAID_BYTES_MAX: usize = 4 << 10;

/// Size of the pieces in which files are sent, in bytes.
const PIECE_BYTES: usize = 64 << 10;

/// A build in its sandbox.
pub(super) struct Session<'a> {
    pub(super) sandbox: &'a BuildSandbox,
    pub(super) operation: &'a Operation,
}

impl Session<'_> {
    /// Builds the image, and returns it as an archive.
    pub(super) async fn run(
        &self,
        request: &BuildRequest,
        dockerfile: &Dockerfile,
        context: File,
        bases: &[Base],
    ) -> Result<File, BuildError> {
        let BuildSandbox { control, owner, id, .. } = self.sandbox;
        let used = control.enter(*owner, &id.to_string()).await?;
        let agent = used.agent.acting_as(Some("0"));
        let guest = Guest { control, owner: *owner, agent, operation: self.operation };
        guest.prepare().await?;
        let (mut images, mut names) = (BTreeMap::new(), BTreeMap::new());
        for base in bases {
            let id = guest.load(base).await?;
            names.insert(id.clone(), base.names[1].clone());
            for name in &base.names {
                images.insert(name.clone(), id.clone());
            }
        }
        guest.send_context(context, &request.dockerfile, &request.secrets).await?;
        guest.build(request, dockerfile, &images, names).await?;
        guest.result().await
    }
}

/// The guest of a build.
struct Guest<'a> {
    control: &'a Control,
    owner: UserId,
    agent: AgentClient,
    operation: &'a Operation,
}

impl Guest<'_> {
    async fn prepare(&self) -> Result<(), BuildError> {
        if !self.control.capabilities().shares_kernel {
            self.tool(REMOUNT).await?;
        }
        self.tool(PREPARE).await.map(|said| self.operation.write(&said))
    }

    /// Loads an image into the cache unless it is there. Returns its id.
    async fn load(&self, base: &Base) -> Result<String, BuildError> {
        let Base { image, names: [_, name] } = base;
        // An image's id is the digest of its configuration, the second blob of a row.
        if let Some(id) = image.blobs.get(1) {
            let known =
                format!("buildah inspect --type image {id} >/dev/null 2>&1 && echo yes || true");
            if !self.tool(&known).await?.is_empty() {
                return Ok(id.clone());
            }
        }
        self.operation.write(format!("loading {name}\n").as_bytes());
        let mut archive = self.control.export_row(image).await?;
        let mut upload = self.agent.begin_write("/build/tmp/base", "", None).await?;
        let mut piece = vec![0; PIECE_BYTES];
        loop {
            let length = archive.read(&mut piece).await?;
            if length == 0 || upload.write(&piece[..length]).await.is_err() {
                break;
            }
        }
        // Returns why the guest refused the rest.
        let _is_refused = upload.end().await;
        upload.finish().await?;
        let said = self.tool(LOAD).await?;
        let said = String::from_utf8_lossy(&said);
        let id = said.lines().last().unwrap_or_default().trim().to_owned();
        if id.is_empty() {
            return Err(BuildError::Builder(format!("`{name}` could not be loaded")));
        }
        Ok(id)
    }

    /// Sends the Dockerfile, the context and the secrets.
    async fn send_context(
        &self,
        mut context: File,
        dockerfile: &str,
        secrets: &BTreeMap<String, String>,
    ) -> Result<(), BuildError> {
        let bytes = context.metadata()?.len();
        context.rewind()?;
        let context = tokio::fs::File::from_std(context);
        self.agent.write_file("/build/tmp/context", "", bytes, context).await?;
        self.tool(UNPACK).await?;
        let file = |bytes: &str| (bytes.len() as u64, std::io::Cursor::new(bytes.to_owned()));
        let (bytes, content) = file(dockerfile);
        self.agent.write_file("/build/tmp/Dockerfile", "", bytes, content).await?;
        for (id, secret) in secrets {
            let (bytes, content) = file(secret);
            self.agent.write_file(&secret_path(id), "0600", bytes, content).await?;
        }
        Ok(())
    }

    /// Runs the steps. `images` has the ids of images by what the Dockerfile calls them, and
    /// `names` their names by id.
    async fn build(
        &self,
        request: &BuildRequest,
        dockerfile: &Dockerfile,
        images: &BTreeMap<String, String>,
        names: BTreeMap<String, String>,
    ) -> Result<(), BuildError> {
        let mut progress = Progress::new(names);
        let (mut input, mut output) = self.agent.exec(exec(arguments(request, images))).await?;
        input.end().await?;
        let code = loop {
            match output.next().await? {
                ExecEvent::Stdout(bytes) | ExecEvent::Stderr(bytes) => {
                    self.operation.write(&progress.read(&bytes));
                }
                ExecEvent::TimedOut => {}
                ExecEvent::Exit(code) => break code,
            }
        };
        self.operation.write(&progress.finish());
        if code == 0 {
            return Ok(());
        }
        let step = progress.step.and_then(|begun| {
            let line = dockerfile.line(begun.stage, begun.step)?;
            Some(BuildError::Step { line, step: begun.text, code })
        });
        Err(step.unwrap_or(BuildError::Builder(progress.last)))
    }

    /// Returns the image that was built, as an archive.
    async fn result(&self) -> Result<File, BuildError> {
        let left = self.control.archive_room(self.owner).await?;
        let mut file = tokio::fs::File::from_std(self.control.image_upload()?);
        let request = exec(shell(SEND));
        let (mut input, mut output) = self.agent.exec(request).await?;
        input.end().await?;
        let (mut received, mut said) = (0, Vec::new());
        loop {
            match output.next().await? {
                ExecEvent::Stdout(bytes) => {
                    received += bytes.len() as u64;
                    if received > left {
                        return Err(BuildError::TooLarge(left >> 20));
                    }
                    file.write_all(&bytes).await?;
                }
                ExecEvent::Stderr(bytes) => keep_end(&mut said, &bytes),
                ExecEvent::TimedOut => {}
                ExecEvent::Exit(0) => break,
                ExecEvent::Exit(_) => return Err(builder_error(&said)),
            }
        }
        file.flush().await?;
        Ok(file.into_std().await)
    }

    /// Runs a script that must succeed, and returns its output.
    async fn tool(&self, script: &str) -> Result<Vec<u8>, BuildError> {
        let (code, said, complaint) = self.agent.run(exec(shell(script))).await?;
        if code == 0 { Ok(said) } else { Err(builder_error(&complaint)) }
    }
}

fn shell(script: &str) -> Vec<String> {
    ["sh", "-ec", script].map(str::to_owned).to_vec()
}

/// Runs a command as root.
fn exec(argv: Vec<String>) -> ExecRequest {
    let env = [("TMPDIR", "/build/tmp"), ("HOME", "/root")];
    let env = env.map(|(name, value)| (name.to_owned(), value.to_owned())).into();
    let (user, cwd) = (Some("0".to_owned()), Some("/".to_owned()));
    ExecRequest { argv, env, user, cwd, ..ExecRequest::default() }
}

fn secret_path(id: &str) -> String {
    format!("/run/build/secrets/{id}")
}

/// Returns the command line of a build.
fn arguments(request: &BuildRequest, images: &BTreeMap<String, String>) -> Vec<String> {
    // A `docker` image can say more than an OCI image, such as the shell of its steps.
    let fixed = "buildah build --isolation chroot --format docker --layers --force-rm \
        --tag localhost/result --file /build/tmp/Dockerfile";
    let mut arguments: Vec<String> = fixed.split_whitespace().map(str::to_owned).collect();
    arguments.extend(request.no_cache.then(|| "--no-cache".to_owned()));
    arguments.extend(request.target.iter().map(|target| format!("--target={target}")));
    let values = request.arguments.iter();
    arguments.extend(values.map(|(name, value)| format!("--build-arg={name}={value}")));
    let secrets = request.secrets.keys();
    arguments.extend(secrets.map(|id| format!("--secret=id={id},src={}", secret_path(id))));
    let named = |(name, id)| format!("--build-context={name}=container-image://{id}");
    arguments.extend(images.iter().map(named));
    arguments.push("/build/context".to_owned());
    arguments
}

fn builder_error(said: &[u8]) -> BuildError {
    let said = String::from_utf8_lossy(&said[said.len().saturating_sub(SAID_BYTES_MAX)..]);
    BuildError::Builder(said.trim().to_owned())
}

fn keep_end(said: &mut Vec<u8>, bytes: &[u8]) {
    said.extend_from_slice(bytes);
    let surplus = said.len().saturating_sub(SAID_BYTES_MAX);
    said.drain(..surplus);
}

//! The sandbox side: processes, files and watches of one sandbox, for the holders of its token.

mod files;
mod filesystem;
mod info;
mod process;
mod run;
mod watch;

use axum::extract::Request;
use axum::http::{HeaderMap, Method, header};
use axum::response::{IntoResponse, Response};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use bhatti_agent::CallError;
use bhatti_proto::{ErrorKind, Place};
use bhatti_store::SandboxRow;
use bhatti_types::SandboxState;

use crate::connect::{self, Code, RpcError};
use crate::{E2b, Error, Target, token};

pub(crate) use watch::Watchers;

/// Answers a request to the sandbox side of a sandbox.
pub(crate) async fn serve(e2b: &E2b, row: SandboxRow, request: Request) -> Response {
    let (method, path) = (request.method().clone(), request.uri().path().to_owned());
    if method == Method::OPTIONS {
        return with_cors(().into_response());
    }
    // First: a stranger wakes no sandbox.
    let known = authenticate(&row, &request);
    if path == "/health" && known.is_err() {
        let is_running = row.state == SandboxState::Running;
        let gone = || Error::no_sandbox(&row.id.to_string()).into_response();
        return with_cors(if is_running { info::health() } else { gone() });
    }
    let entered = match known {
        Ok(()) => e2b.enter(row).await,
        Err(error) => Err(error),
    };
    let target = match entered {
        Ok(target) => target,
        Err(error) => return with_cors(error.into_response()),
    };
    let response = match (&method, path.as_str()) {
        (&Method::GET, "/health") => info::health(),
        (&Method::GET, "/files") => files::read(&target, request).await,
        (&Method::POST, "/files") => files::write(&target, request).await,
        (&Method::GET, "/metrics") => info::metrics(&target).await,
        (&Method::GET, "/envs") => info::environment(&target),
        (&Method::POST, path) => match call_of(path) {
            Some(call) => rpc(e2b, target, call, request).await,
            None => no_route(path).into_response(),
        },
        (_, path) => no_route(path).into_response(),
    };
    with_cors(response)
}

fn no_route(path: &str) -> Error {
    Error::not_found(format!("no route {path:?}"))
}

/// Browsers use the SDK, too.
fn with_cors(mut response: Response) -> Response {
    let headers = response.headers_mut();
    for (name, value) in [
        (header::ACCESS_CONTROL_ALLOW_ORIGIN, "*"),
        (header::ACCESS_CONTROL_ALLOW_METHODS, "GET, POST, OPTIONS"),
        (header::ACCESS_CONTROL_ALLOW_HEADERS, "*, Authorization"),
        (header::ACCESS_CONTROL_EXPOSE_HEADERS, "*"),
    ] {
        headers.insert(name, header::HeaderValue::from_static(value));
    }
    response
}

/// Checks the token. Requests for files may have a signature in its place.
pub(crate) fn authenticate(row: &SandboxRow, request: &Request) -> Result<(), Error> {
    let wanted = token::access(row);
    let shown = request.headers().get("x-access-token");
    if shown.is_some_and(|shown| token::equal(shown.as_bytes(), &wanted)) {
        return Ok(());
    }
    if request.uri().path() != "/files" {
        return Err(Error::unauthorized(
            "unauthorized access, please provide a valid access token",
        ));
    }
    if shown.is_some() {
        return Err(Error::unauthorized("access token present in header but does not match"));
    }
    let query = request.uri().query().unwrap_or_default();
    let signed = token::Signed::of(query, request.method())
        .ok_or_else(|| Error::bad_request("invalid query"))?;
    let now = u64::try_from(jiff::Timestamp::now().as_second()).unwrap_or_default();
    signed.check(row, now).map_err(Error::unauthorized)
}

/// A procedure.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Call {
    Process(process::Method),
    Filesystem(filesystem::Method),
}

/// Returns the procedure with this path.
fn call_of(path: &str) -> Option<Call> {
    match path.strip_prefix('/')?.split_once('/')? {
        ("process.Process", name) => process::Method::of(name).map(Call::Process),
        ("filesystem.Filesystem", name) => filesystem::Method::of(name).map(Call::Filesystem),
        _ => None,
    }
}

async fn rpc(e2b: &E2b, target: Target, call: Call, request: Request) -> Response {
    let kind = match call {
        Call::Process(method) => method.kind(),
        Call::Filesystem(method) => method.kind(),
    };
    if let Err(response) = connect::check_type(kind, request.headers()) {
        return response;
    }
    let called = match call {
        Call::Process(method) => process::call(target, method, request).await,
        Call::Filesystem(method) => filesystem::call(e2b, target, method, request).await,
    };
    called.unwrap_or_else(|error| connect::failed(kind, error))
}

/// Returns the user that a request names: the name in a Basic authorization, which has no secret.
fn user(headers: &HeaderMap) -> Result<Option<String>, RpcError> {
    let Some(value) = headers.get(header::AUTHORIZATION) else { return Ok(None) };
    let decoded = || {
        let (scheme, encoded) = value.to_str().ok()?.split_once(' ')?;
        let is_basic = scheme.eq_ignore_ascii_case("basic");
        let decoded = is_basic.then(|| STANDARD.decode(encoded.trim()).ok())??;
        let text = String::from_utf8(decoded).ok()?;
        Some(text.split(':').next().unwrap_or_default().to_owned())
    };
    let user = decoded().ok_or_else(|| {
        RpcError::new(Code::Unauthenticated, "invalid header `Authorization`: expected Basic")
    })?;
    Ok((!user.is_empty()).then_some(user))
}

/// Returns what a path means to the user of a request.
async fn place(target: &Target, path: &str, user: Option<&str>) -> Result<Place, RpcError> {
    let placed = target.used.agent.place(path, user).await;
    placed.map_err(|error| refused(error, user))
}

/// Describes a failed call of the agent. `user` is the user that the request named.
fn refused(error: CallError, user: Option<&str>) -> RpcError {
    let agent = match error {
        CallError::Agent(agent) => agent,
        CallError::Lost | CallError::Channel(_) | CallError::Send(_) | CallError::Write(_) => {
            return RpcError::new(Code::Unavailable, "the sandbox does not answer");
        }
        CallError::TooMuch { .. } => {
            return RpcError::new(Code::ResourceExhausted, error.to_string());
        }
        error => return RpcError::new(Code::Internal, error.to_string()),
    };
    let code = match agent.kind {
        ErrorKind::NoSuchUser => {
            let user = user.unwrap_or_default();
            return RpcError::new(Code::Unauthenticated, format!("invalid username: '{user}'"));
        }
        ErrorKind::NotFound | ErrorKind::NoSuchSession => Code::NotFound,
        ErrorKind::AlreadyExists => Code::AlreadyExists,
        ErrorKind::PermissionDenied => Code::PermissionDenied,
        ErrorKind::Limit | ErrorKind::TooLarge | ErrorKind::NoSpace => Code::ResourceExhausted,
        ErrorKind::NotExecutable
        | ErrorKind::BadCwd
        | ErrorKind::BadRequest
        | ErrorKind::IsDirectory
        | ErrorKind::NotDirectory
        | ErrorKind::NotRegular
        | ErrorKind::NotEmpty => Code::InvalidArgument,
        ErrorKind::Unauthorized | ErrorKind::Other => Code::Internal,
    };
    RpcError::new(code, agent.message)
}

/// The kind of a procedure, and its name in paths.
macro_rules! methods {
    ($($name:ident: $kind:ident,)*) => {
        /// The procedures of this service.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub(super) enum Method {
            $($name,)*
        }

        impl Method {
            pub(super) fn of(name: &str) -> Option<Self> {
                match name {
                    $(stringify!($name) => Some(Self::$name),)*
                    _ => None,
                }
            }

            pub(super) const fn kind(self) -> $crate::connect::Kind {
                match self {
                    $(Self::$name => $crate::connect::Kind::$kind,)*
                }
            }
        }
    };
}
use methods;

#[cfg(test)]
mod tests {
    use super::*;

    fn user_of(value: &str) -> Result<Option<String>, RpcError> {
        let mut headers = HeaderMap::new();
        headers.insert(header::AUTHORIZATION, value.parse().unwrap());
        user(&headers)
    }

    #[test]
    fn user_is_the_name_of_a_basic_authorization() {
        assert_eq!(user(&HeaderMap::new()).unwrap(), None);
        assert_eq!(user_of("Basic cm9vdDo=").unwrap().as_deref(), Some("root"));
        assert_eq!(user_of("basic dXNlcg==").unwrap().as_deref(), Some("user"));
        assert_eq!(user_of("Basic Og==").unwrap(), None);
        for wrong in ["Bearer x", "Basic", "Basic !", "Basic /w=="] {
            assert_eq!(user_of(wrong).unwrap_err().code, Code::Unauthenticated, "{wrong}");
        }
    }

    #[test]
    fn procedures_are_found_by_their_paths() {
        let start = call_of("/process.Process/Start");
        assert_eq!(start, Some(Call::Process(process::Method::Start)));
        for path in ["/process.Process/start", "/process.Process", "/x.Y/Start", "/", ""] {
            assert_eq!(call_of(path), None, "{path}");
        }
    }
}

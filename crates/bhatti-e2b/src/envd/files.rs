//! `/files`: the content of files.

use std::collections::BTreeMap;
use std::io::Write as _;
use std::sync::Arc;

use axum::body::Body;
use axum::extract::{DefaultBodyLimit, FromRequest, Multipart, Request};
use axum::http::{HeaderMap, HeaderValue, header};
use axum::response::{IntoResponse, Response};
use bhatti_agent::{CallError, FileContent, FileUpload, ReadOptions};
use bhatti_proto::{ErrorKind, InPlace, Place};
use bytes::Bytes;
use flate2::write::GzDecoder;
use futures_util::{StreamExt, stream};
use parking_lot::Mutex;
use serde_json::{Value, json};

use super::filesystem::METADATA_PREFIX;
use super::{refused, user};
use crate::connect::Code;
use crate::token::Signed;
use crate::{Error, Target, status};

/// Compressed bytes that are decompressed at once: each may become a thousand.
const COMPRESSED_PIECE_BYTES: usize = 4 << 10;

/// The longest name of a metadata entry, and all of a file's metadata, in bytes.
const METADATA_NAME_BYTES_MAX: usize = 246;
const METADATA_BYTES_MAX: usize = 4096;

/// The most files of one form.
const PARTS_MAX: usize = 1000;

/// The most that is read of a form until the head of a part is complete, in bytes. A piece of the
/// connection may have the end of the part before.
const HEAD_BYTES_MAX: usize = 2 << 20;

/// The prefix of headers with metadata.
const METADATA_HEADER: &str = "x-metadata-";

/// Answers a GET.
pub(super) async fn read(target: &Target, request: Request) -> Response {
    let read = match path_and_user(&request) {
        Ok((path, user)) => try_read(target, path, user).await,
        Err(error) => Err(error),
    };
    read.unwrap_or_else(IntoResponse::into_response)
}

async fn try_read(target: &Target, path: String, user: Option<String>) -> Result<Response, Error> {
    let place = placed(target, &path, user.as_deref()).await?;
    let agent = target.used.agent.acting_as(Some("0"));
    let content = agent.read_file(&place.path, ReadOptions::default()).await;
    let mut content = content.map_err(|error| failed(error, user.as_deref()))?;
    let first = content.next().await.map_err(|error| failed(error, user.as_deref()))?;
    let size = u64::try_from(content.info.size).unwrap_or_default();
    // A file of `/proc` has the size 0 and content: its length is unknown.
    let length = if first.is_none() { Some(0) } else { Some(size).filter(|size| *size > 0) };
    let mut response = match first {
        None => Body::empty().into_response(),
        Some(first) => Body::from_stream(pieces(target.clone(), first, content)).into_response(),
    };
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/octet-stream"));
    if let Some(length) = length {
        headers.insert(header::CONTENT_LENGTH, length.into());
    }
    Ok(response)
}

fn pieces(
    target: Target,
    first: Bytes,
    content: FileContent,
) -> impl futures_util::Stream<Item = Result<Bytes, CallError>> {
    stream::once(async { Ok(first) }).chain(stream::unfold(
        (target, content),
        async |(target, mut content)| {
            let piece = content.next().await.transpose()?;
            Some((piece, (target, content)))
        },
    ))
}

/// Answers a POST.
pub(super) async fn write(target: &Target, request: Request) -> Response {
    match try_write(target, request).await {
        Ok(written) => axum::Json(Value::Array(written)).into_response(),
        Err(error) => error.into_response(),
    }
}

async fn try_write(target: &Target, mut request: Request) -> Result<Vec<Value>, Error> {
    let (path, user) = path_and_user(&request)?;
    let metadata = metadata(request.headers())?;
    let encoding = encoding(request.headers())?;
    let files = Files { target, user: user.as_deref(), metadata };
    let kind = request.headers().get(header::CONTENT_TYPE);
    let kind = kind.and_then(|kind| kind.to_str().ok()).unwrap_or_default();
    if kind.starts_with("multipart/form-data") {
        // The agent limits the size of a file.
        DefaultBodyLimit::disable().apply(&mut request);
        let heads = Heads::default();
        let request = request.map(|body| heads.limited(body));
        let form = Multipart::from_request(request, &()).await;
        let form = form.map_err(|error| Error::bad_request(error.to_string()))?;
        return files.write_form(&path, form, &heads).await;
    }
    if !kind.starts_with("application/octet-stream") {
        return Err(Error::bad_request(format!("invalid content type {kind:?}")));
    }
    if path.is_empty() {
        return Err(Error::bad_request("path is required"));
    }
    let body = request.into_body().into_data_stream();
    let body = body.map(|piece| piece.map_err(|_| Error::bad_request("the request ended early")));
    Ok(vec![files.write_one(&path, encoding, Box::pin(body)).await?])
}

/// Limits what is read of a form before the head of a part is complete: the parser keeps all of it.
#[derive(Clone, Default)]
struct Heads(Arc<Mutex<Option<usize>>>);

impl Heads {
    /// A head begins.
    fn begin(&self) {
        *self.0.lock() = Some(0);
    }

    /// A head is complete.
    fn end(&self) {
        *self.0.lock() = None;
    }

    fn limited(&self, body: Body) -> Body {
        let heads = self.clone();
        Body::from_stream(body.into_data_stream().map(move |piece| {
            let piece = piece?;
            if let Some(bytes) = &mut *heads.0.lock() {
                *bytes += piece.len();
                if *bytes > HEAD_BYTES_MAX {
                    return Err(axum::Error::new(std::io::Error::other(
                        "a part's head is too long",
                    )));
                }
            }
            Ok(piece)
        }))
    }
}

/// How a body is encoded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Encoding {
    Plain,
    Gzip,
}

fn encoding(headers: &HeaderMap) -> Result<Encoding, Error> {
    let text = headers.get(header::CONTENT_ENCODING).map(|value| value.to_str());
    match text {
        None | Some(Ok("identity" | "")) => Ok(Encoding::Plain),
        Some(Ok("gzip")) => Ok(Encoding::Gzip),
        Some(other) => {
            let other = other.unwrap_or_default();
            Err(Error::bad_request(format!("unknown content encoding {other:?}")))
        }
    }
}

/// Files that are written for one user.
struct Files<'a> {
    target: &'a Target,
    user: Option<&'a str>,
    metadata: BTreeMap<String, String>,
}

impl Files<'_> {
    async fn write_form(
        &self,
        path: &str,
        mut form: Multipart,
        heads: &Heads,
    ) -> Result<Vec<Value>, Error> {
        let invalid =
            |error: axum::extract::multipart::MultipartError| Error::bad_request(error.to_string());
        let (mut written, mut paths) = (Vec::new(), Vec::new());
        loop {
            heads.begin();
            let Some(field) = form.next_field().await.map_err(invalid)? else { break };
            heads.end();
            if paths.len() >= PARTS_MAX {
                return Err(Error::bad_request(format!("the form has over {PARTS_MAX} files")));
            }
            if field.name() != Some("file") {
                continue;
            }
            let named = if path.is_empty() { field.file_name().unwrap_or_default() } else { path };
            let named = named.to_owned();
            if named.is_empty() {
                return Err(Error::bad_request("a part `file` without a file name"));
            }
            let place = placed(self.target, &named, self.user).await?;
            if paths.contains(&place.path) {
                let message =
                    format!("you cannot upload multiple files to the same path {named:?}");
                return Err(Error::bad_request(message));
            }
            paths.push(place.path);
            let body = field.map(move |piece| piece.map_err(invalid));
            written.push(self.write_one(&named, Encoding::Plain, Box::pin(body)).await?);
        }
        if written.is_empty() {
            return Err(Error::bad_request("the form has no part `file`"));
        }
        Ok(written)
    }

    async fn write_one(
        &self,
        path: &str,
        encoding: Encoding,
        mut body: impl futures_util::Stream<Item = Result<Bytes, Error>> + Unpin,
    ) -> Result<Value, Error> {
        let Place { path, ids, .. } = placed(self.target, path, self.user).await?;
        let how = InPlace {
            owner: ids,
            attributes: self
                .metadata
                .iter()
                .map(|(name, value)| (format!("{METADATA_PREFIX}{name}"), value.clone()))
                .collect(),
            prefix: Some(METADATA_PREFIX.to_owned()),
        };
        let refused = |error| failed(error, self.user);
        let upload = self.target.used.agent.begin_write_in_place(&path, how).await;
        let mut upload = upload.map_err(refused)?;
        let mut decoder = Decoder::of(encoding);
        while let Some(piece) = body.next().await {
            // Without an end, the guest knows that the content is not whole.
            if !decoder.pass(&piece?, &mut upload).await? {
                break;
            }
        }
        decoder.finish(&mut upload).await?;
        // If the guest has refused the rest, the answer below says why.
        drop(upload.end().await);
        upload.finish().await.map_err(refused)?;
        let name = path.rsplit('/').next().unwrap_or_default();
        let mut written = json!({ "path": path, "name": name, "type": "file" });
        if !self.metadata.is_empty() {
            written["metadata"] = json!(self.metadata);
        }
        Ok(written)
    }
}

/// Passes a body on, decompressed.
enum Decoder {
    Plain,
    Gzip(Box<GzDecoder<Vec<u8>>>),
}

impl Decoder {
    fn of(encoding: Encoding) -> Self {
        match encoding {
            Encoding::Plain => Self::Plain,
            Encoding::Gzip => Self::Gzip(Box::new(GzDecoder::new(Vec::new()))),
        }
    }

    /// Returns false if the guest takes no more.
    async fn pass(&mut self, bytes: &[u8], upload: &mut FileUpload) -> Result<bool, Error> {
        let Self::Gzip(decoder) = self else {
            return Ok(upload.write(bytes).await.is_ok());
        };
        for piece in bytes.chunks(COMPRESSED_PIECE_BYTES) {
            decoder.write_all(piece).map_err(|error| not_gzip(&error))?;
            let plain = std::mem::take(decoder.get_mut());
            if upload.write(&plain).await.is_err() {
                return Ok(false);
            }
        }
        Ok(true)
    }

    async fn finish(self, upload: &mut FileUpload) -> Result<(), Error> {
        if let Self::Gzip(decoder) = self {
            let rest = decoder.finish().map_err(|error| not_gzip(&error))?;
            // If the guest takes no more, it has said why.
            drop(upload.write(&rest).await);
        }
        Ok(())
    }
}

fn not_gzip(error: &std::io::Error) -> Error {
    Error::bad_request(format!("the body is not valid gzip: {error}"))
}

/// Returns path and user of a request, from its query or its Basic authorization.
fn path_and_user(request: &Request) -> Result<(String, Option<String>), Error> {
    let query = request.uri().query().unwrap_or_default();
    let signed = Signed::of(query, request.method());
    let Signed { path, username, .. } =
        signed.ok_or_else(|| Error::bad_request("invalid query"))?;
    let named = username.filter(|name| !name.is_empty());
    // A signature is for the user of the URL.
    let is_signed = request.headers().get("x-access-token").is_none();
    let user = match named {
        Some(name) => Some(name),
        None if is_signed => None,
        None => user(request.headers()).map_err(|error| Error::unauthorized(error.message))?,
    };
    Ok((path, user))
}

async fn placed(target: &Target, path: &str, user: Option<&str>) -> Result<Place, Error> {
    let place = target.used.agent.place(path, user).await;
    place.map_err(|error| failed(error, user))
}

fn failed(error: CallError, user: Option<&str>) -> Error {
    if let CallError::Agent(agent) = &error
        && agent.kind == ErrorKind::NoSpace
    {
        return Error::no_space("not enough disk space available");
    }
    let refused = refused(error, user);
    match refused.code {
        Code::NotFound => Error::not_found(refused.message),
        Code::Unauthenticated => Error::unauthorized(refused.message),
        Code::InvalidArgument | Code::AlreadyExists => Error::bad_request(refused.message),
        Code::PermissionDenied => Error::forbidden(refused.message),
        Code::Unavailable => Error::new(status::BAD_GATEWAY, refused.message),
        _ => Error::internal(refused.message),
    }
}

/// Returns the metadata in the headers of a request, by names in lower case.
fn metadata(headers: &HeaderMap) -> Result<BTreeMap<String, String>, Error> {
    let mut metadata = BTreeMap::new();
    let mut bytes = 0;
    for (name, value) in headers {
        let Some(name) = name.as_str().strip_prefix(METADATA_HEADER) else { continue };
        let text = value.to_str().ok().filter(|text| text.bytes().all(|b| (32..127).contains(&b)));
        let text = text.ok_or_else(|| {
            Error::bad_request(format!("metadata {name:?}: values are printable ASCII"))
        })?;
        if name.is_empty() || name.len() > METADATA_NAME_BYTES_MAX {
            let message =
                format!("metadata {name:?}: names have 1 to {METADATA_NAME_BYTES_MAX} bytes");
            return Err(Error::bad_request(message));
        }
        bytes += name.len() + text.len();
        metadata.insert(name.to_owned(), text.to_owned());
    }
    if bytes > METADATA_BYTES_MAX {
        let message = format!("the metadata has {bytes} bytes: at most {METADATA_BYTES_MAX}");
        return Err(Error::bad_request(message));
    }
    Ok(metadata)
}

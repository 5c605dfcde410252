//! Pushes images: sends the blobs that a registry lacks, and then the manifest.
//!
//! Source: the OCI distribution specification, "Pushing a blob monolithically" and "Pushing
//! manifests".

use std::time::Duration;

use bytes::Bytes;
use futures_util::StreamExt;
use http::header::{CONTENT_LENGTH, CONTENT_TYPE, HeaderValue, LOCATION};
use http::{Method, Uri};
use http_body_util::{BodyExt, Full, StreamBody};
use hyper::body::Frame;
use tokio_util::io::ReaderStream;

use crate::auth::Credentials;
use crate::blobs::{Blobs, Progress};
use crate::client::{Registries, Source};
use crate::error::RegistryError;
use crate::http::{Body, Sent};
use crate::image::Blob;
use crate::reference::Reference;

/// The time that any upload may take, and the slowest rate after that, in bytes per second.
const UPLOAD_START: Duration = Duration::from_mins(10);
const UPLOAD_RATE: u64 = 16 << 10;
/// Size of the pieces of an upload, in bytes.
const PIECE_BYTES: usize = 64 << 10;

/// An image to push.
#[derive(Clone, Copy, Debug)]
pub struct Pushed<'a> {
    /// The manifest.
    pub manifest: &'a [u8],
    /// Its media type.
    pub media_type: &'a str,
    /// The configuration and the layers.
    pub parts: &'a [Blob],
}

impl Registries {
    /// Pushes an image as `reference`. Blobs that the registry has already are not sent.
    ///
    /// # Errors
    ///
    /// Returns an error that names the registry. Transient failures are retried before; a registry
    /// that cannot be connected to is tried for some seconds only. Blobs that were sent may stay at
    /// the registry.
    ///
    /// # Cancel safety
    ///
    /// The registry has no image without its manifest, which comes last.
    pub async fn push(
        &self,
        reference: &Reference,
        credentials: Option<&Credentials>,
        blobs: &Blobs,
        image: Pushed<'_>,
        progress: &[&dyn Progress],
    ) -> Result<(), RegistryError> {
        for (number, blob) in image.parts.iter().enumerate() {
            let progress = progress.get(number).copied();
            let mut attempts = self.own_attempts(reference, credentials);
            if number == 0 {
                attempts = attempts.of_first_contact();
            }
            while let Err(error) = self.push_blob(attempts.server(), blobs, blob, progress).await {
                attempts.next_after(error).await?;
            }
        }
        let mut attempts = self.own_attempts(reference, credentials);
        while let Err(error) = self.push_manifest(attempts.server(), reference, image).await {
            attempts.next_after(error).await?;
        }
        Ok(())
    }

    async fn push_blob(
        &self,
        source: &Source,
        blobs: &Blobs,
        blob: &Blob,
        progress: Option<&dyn Progress>,
    ) -> Result<(), RegistryError> {
        let path = format!("blobs/{}", blob.digest());
        match self.send(source, Method::HEAD, self.uri(source, &path)?, Vec::new(), None).await {
            Ok(_) => {
                if let Some(progress) = progress {
                    progress.add(blob.bytes);
                }
                return Ok(());
            }
            Err(RegistryError::NotFound(_)) => {}
            // A registry may keep its blobs elsewhere.
            Err(RegistryError::Status { status, .. }) if status.is_redirection() => return Ok(()),
            Err(error) => return Err(error),
        }
        let begin = self.uri(source, "blobs/uploads/")?;
        let begun = self.send(source, Method::POST, begin.clone(), Vec::new(), None).await?;
        let place = upload_place(source, &begin, begun.headers().get(LOCATION), blob)?;
        let file = tokio::fs::File::from_std(blobs.open(&blob.sha256)?);
        let headers = vec![
            (CONTENT_LENGTH, HeaderValue::from(blob.bytes)),
            (CONTENT_TYPE, HeaderValue::from_static("application/octet-stream")),
        ];
        let pieces =
            ReaderStream::with_capacity(file, PIECE_BYTES).map(|piece| piece.map(Frame::data));
        let body: Body = BodyExt::boxed_unsync(StreamBody::new(pieces));
        let limit = UPLOAD_START + Duration::from_secs(blob.bytes / UPLOAD_RATE);
        self.send(source, Method::PUT, place, headers, Some(Sent { body, limit })).await?;
        if let Some(progress) = progress {
            progress.add(blob.bytes);
        }
        Ok(())
    }

    async fn push_manifest(
        &self,
        source: &Source,
        reference: &Reference,
        image: Pushed<'_>,
    ) -> Result<(), RegistryError> {
        let uri = self.uri(source, &format!("manifests/{}", reference.version()))?;
        let content = Bytes::copy_from_slice(image.manifest);
        let kind = HeaderValue::from_str(image.media_type);
        let malformed = |_| RegistryError::Malformed {
            what: "a manifest of a type",
            host: source.server().to_owned(),
        };
        let headers = vec![
            (CONTENT_LENGTH, HeaderValue::from(content.len())),
            (CONTENT_TYPE, kind.map_err(malformed)?),
        ];
        let body = Full::new(content).map_err(|never| match never {}).boxed_unsync();
        let sent = Sent { body, limit: UPLOAD_START };
        self.send(source, Method::PUT, uri, headers, Some(sent)).await.map(drop)
    }
}

/// Returns where a registry wants a blob: the place that it named, with the digest.
fn upload_place(
    source: &Source,
    begin: &Uri,
    location: Option<&HeaderValue>,
    blob: &Blob,
) -> Result<Uri, RegistryError> {
    let malformed = || RegistryError::Malformed {
        what: "the place of an upload",
        host: source.server().to_owned(),
    };
    let location = location.and_then(|value| value.to_str().ok()).ok_or_else(malformed)?;
    let place = crate::http::resolve(begin, location).map_err(|_| malformed())?;
    let mark = if place.query().is_some() { '&' } else { '?' };
    // The colon of a digest must be escaped in some registries, and may be in all.
    format!("{place}{mark}digest=sha256%3A{}", blob.sha256).parse().map_err(|_| malformed())
}

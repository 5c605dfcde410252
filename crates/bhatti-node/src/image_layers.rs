//! Images as a manifest and blobs: what an import keeps, and what an export writes.
//!
//! Source: the OCI image specification, `manifest.md` and `image-layout.md`; `manifest.json` is
//! Docker's own format, which Docker before version 25 needs.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, BufReader, Read, Write};
use std::os::unix::fs::FileExt;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{self, Poll, ready};

use bhatti_host::blocking;
use bhatti_image::{Configuration, Imported, LayerFile};
use bhatti_registry::{Blob, Blobs, Credentials, Progress, Pushed, Reference, RegistryError};
use flate2::Compression;
use flate2::bufread::MultiGzDecoder;
use flate2::write::GzEncoder;
use ring::digest::{Context, SHA256};
use serde::{Deserialize, Serialize};
use serde_json::json;
use tar::{Builder, EntryType, Header};
use tokio::io::{AsyncRead, DuplexStream, ReadBuf};
use tokio::task::JoinHandle;
use tokio_util::io::SyncIoBridge;

use crate::Node;
use crate::images::{blobs, registries};
use crate::pull::{PullError, PullProgress};

const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
const INDEX: &str = "application/vnd.oci.image.index.v1+json";
const CONFIG: &str = "application/vnd.oci.image.config.v1+json";
const GZIP: &str = "application/vnd.oci.image.layer.v1.tar+gzip";
const ZSTD: &str = "application/vnd.oci.image.layer.v1.tar+zstd";
const PLAIN: &str = "application/vnd.oci.image.layer.v1.tar";

/// Size of the pieces in which layers are copied, in bytes.
const PIECE_BYTES: usize = 128 << 10;

/// Bytes of an archive that wait for a reader.
const WAITING_BYTES: usize = 256 << 10;

/// A manifest.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Manifest {
    schema_version: u32,
    #[serde(default)]
    media_type: Option<String>,
    config: Descriptor,
    layers: Vec<Descriptor>,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Descriptor {
    media_type: String,
    digest: String,
    size: u64,
}

impl Descriptor {
    fn new(media_type: &str, blob: &Blob) -> Self {
        Self { media_type: media_type.to_owned(), digest: blob.digest(), size: blob.bytes }
    }

    fn sha256(&self) -> &str {
        self.digest.trim_start_matches("sha256:")
    }

    /// Returns the same descriptor with a media type of the OCI specification.
    fn of_oci(&self) -> Self {
        let media_type = match self.media_type.as_str() {
            "application/vnd.docker.container.image.v1+json" => CONFIG,
            "application/vnd.docker.image.rootfs.diff.tar.gzip" => GZIP,
            "application/vnd.docker.image.rootfs.diff.tar.zstd" => ZSTD,
            "application/vnd.docker.image.rootfs.diff.tar" => PLAIN,
            other => other,
        };
        Self { media_type: media_type.to_owned(), ..self.clone() }
    }
}

/// The manifest of an imported image and its blobs, by their SHA-256 in hexadecimal.
#[derive(Debug)]
pub struct KeptLayers {
    /// Size of the layers, in bytes.
    pub bytes: u64,
    /// The manifest.
    pub manifest: String,
    /// The manifest, the configuration and the layers.
    pub blobs: Vec<String>,
}

impl Node {
    /// Keeps the layers of an imported image. A layer that an image of `known` has, of which these
    /// are the manifests, is not kept again. Those that are not compressed are compressed. The
    /// caller holds the images.
    ///
    /// # Errors
    ///
    /// Returns an error if a file cannot be read or written.
    pub async fn keep_layers(
        &self,
        imported: Imported,
        known: Vec<String>,
    ) -> Result<KeptLayers, RegistryError> {
        let blobs = blobs(&self.shared);
        let kept = tokio::task::spawn_blocking(move || {
            let known = layers_by_content(&blobs, &known);
            keep(&blobs, &imported, &known)
        });
        let kept = kept.await;
        kept.unwrap_or_else(|_| Err(interrupted()))
    }

    /// Pushes an image as `reference`.
    ///
    /// # Errors
    ///
    /// Returns an error that names the registry.
    pub async fn push_image(
        &self,
        manifest: &str,
        reference: &Reference,
        credentials: Option<&Credentials>,
        progress: Arc<dyn PullProgress>,
    ) -> Result<(), PullError> {
        let registries = registries(&self.shared)?;
        let blobs = blobs(&self.shared);
        let (read, text) = blocking(|| read_manifest(&blobs, manifest))?;
        let part = |descriptor: &Descriptor| Blob {
            sha256: descriptor.sha256().to_owned(),
            bytes: descriptor.size,
        };
        let parts: Vec<Blob> = [&read.config].into_iter().chain(&read.layers).map(part).collect();
        progress.begin(&parts);
        let sent: Vec<Sent> =
            (0..parts.len()).map(|number| Sent { number, progress: &*progress }).collect();
        let sent: Vec<&dyn Progress> = sent.iter().map(|sent| sent as &dyn Progress).collect();
        let media_type = read.media_type.as_deref().unwrap_or(MANIFEST);
        let image = Pushed { manifest: &text, media_type, parts: &parts };
        Ok(registries.push(reference, credentials, &blobs, image, &sent).await?)
    }

    /// Writes an image as an OCI layout, which Docker can load, too. Returns the archive's reader.
    ///
    /// # Errors
    ///
    /// Returns an error if a blob of the image is missing.
    pub async fn export_image(
        &self,
        manifest: &str,
        name: &str,
    ) -> Result<ImageArchive, RegistryError> {
        let held = self.hold_images().await;
        let (blobs, manifest) = (blobs(&self.shared), manifest.to_owned());
        let opened = tokio::task::spawn_blocking(move || Layout::open(&blobs, &manifest)).await;
        let layout = opened.unwrap_or_else(|_| Err(interrupted()))?;
        let (reader, writer) = tokio::io::duplex(WAITING_BYTES);
        let (name, writer) = (name.to_owned(), SyncIoBridge::new(writer));
        // The files are open, so a slow reader does not keep others' files from being removed.
        drop(held);
        let written = tokio::task::spawn_blocking(move || layout.write(&name, writer));
        Ok(ImageArchive { reader, written })
    }
}

/// An image that is being written as an archive. Dropping it ends the work.
pub struct ImageArchive {
    reader: DuplexStream,
    written: JoinHandle<io::Result<()>>,
}

impl AsyncRead for ImageArchive {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut task::Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buffer.filled().len();
        ready!(Pin::new(&mut self.reader).poll_read(cx, buffer))?;
        if buffer.filled().len() > before || buffer.remaining() == 0 {
            return Poll::Ready(Ok(()));
        }
        // The end is that of the archive only if all of it was written.
        let written = ready!(Pin::new(&mut self.written).poll(cx));
        Poll::Ready(written.map_err(io::Error::other).flatten())
    }
}

/// Reports a blob that was sent.
struct Sent<'a> {
    number: usize,
    progress: &'a dyn PullProgress,
}

impl Progress for Sent<'_> {
    fn add(&self, bytes: u64) {
        self.progress.arrived(self.number, bytes.cast_signed());
    }

    fn remove(&self, bytes: u64) {
        self.progress.arrived(self.number, -bytes.cast_signed());
    }
}

fn read_manifest(blobs: &Blobs, sha256: &str) -> Result<(Manifest, Vec<u8>), RegistryError> {
    let mut text = Vec::new();
    let failed = |source| RegistryError::File { step: "read", path: sha256.into(), source };
    blobs.open(sha256)?.read_to_end(&mut text).map_err(failed)?;
    let manifest = serde_json::from_slice(&text).map_err(|error| failed(error.into()))?;
    Ok((manifest, text))
}

fn interrupted() -> RegistryError {
    RegistryError::File {
        step: "read",
        path: "blobs".into(),
        source: io::ErrorKind::Interrupted.into(),
    }
}

/// Returns the layers of the images with these manifests, by the SHA-256 of their unpacked content.
/// Leaves out what cannot be read.
fn layers_by_content(blobs: &Blobs, manifests: &[String]) -> BTreeMap<String, Descriptor> {
    let mut layers = BTreeMap::new();
    for manifest in manifests {
        let Ok((manifest, _)) = read_manifest(blobs, manifest) else { continue };
        let mut written = Vec::new();
        let config = blobs.open(manifest.config.sha256());
        let read = config.ok().and_then(|mut file| file.read_to_end(&mut written).ok());
        let Some(Ok(config)) = read.map(|_| Configuration::parse(&written)) else { continue };
        layers.extend(config.diff_ids.into_iter().zip(manifest.layers));
    }
    layers
}

fn keep(
    blobs: &Blobs,
    imported: &Imported,
    known: &BTreeMap<String, Descriptor>,
) -> Result<KeptLayers, RegistryError> {
    let mut layers: Vec<Descriptor> = Vec::new();
    for (layer, diff_id) in imported.layers.iter().zip(&imported.diff_ids) {
        // A manifest can contradict its configuration.
        let same = known.get(diff_id).filter(|same| unpacks_to(blobs, same, diff_id));
        match same {
            Some(same) => layers.push(same.of_oci()),
            None => {
                let (kind, blob) = keep_layer(blobs, layer)?;
                layers.push(Descriptor::new(kind, &blob));
            }
        }
    }
    let sha256 = blobs.keep(&imported.written_config)?;
    let config = Blob { sha256, bytes: imported.written_config.len() as u64 };
    let manifest = Manifest {
        schema_version: 2,
        media_type: Some(MANIFEST.to_owned()),
        config: Descriptor::new(CONFIG, &config),
        layers,
    };
    let text = blobs.keep(json!(manifest).to_string().as_bytes())?;
    let bytes = manifest.layers.iter().map(|layer| layer.size).sum();
    let all = [text.clone(), config.sha256].into_iter();
    let all = all.chain(manifest.layers.iter().map(|layer| layer.sha256().to_owned()));
    Ok(KeptLayers { bytes, blobs: all.collect(), manifest: text })
}

/// Whether a layer unpacks to a tar archive with this SHA-256, in hexadecimal. Layers that are
/// compressed with zstd do not count.
fn unpacks_to(blobs: &Blobs, layer: &Descriptor, diff_id: &str) -> bool {
    let Ok(file) = blobs.open(layer.sha256()) else { return false };
    let mut content: Box<dyn Read> = match layer.of_oci().media_type.as_str() {
        GZIP => Box::new(MultiGzDecoder::new(BufReader::with_capacity(PIECE_BYTES, file))),
        PLAIN => Box::new(file),
        _ => return false,
    };
    let (mut hash, mut piece) = (Context::new(&SHA256), vec![0; PIECE_BYTES]);
    loop {
        match content.read(&mut piece) {
            Ok(0) => return hex::encode(hash.finish()) == diff_id,
            Ok(length) => hash.update(&piece[..length]),
            Err(_) => return false,
        }
    }
}

fn keep_layer(blobs: &Blobs, layer: &LayerFile) -> Result<(&'static str, Blob), RegistryError> {
    let mut magic = [0; 4];
    let is_short = layer.file.read_exact_at(&mut magic, layer.offset).is_err();
    let kind = match magic {
        _ if is_short => None,
        [0x1f, 0x8b, ..] => Some(GZIP),
        [0x28, 0xb5, 0x2f, 0xfd] => Some(ZSTD),
        _ => None,
    };
    let blob = blobs.add(|to| {
        if kind.is_some() {
            return copy(layer, to);
        }
        let mut encoder = GzEncoder::new(to, Compression::fast());
        copy(layer, &mut encoder)?;
        encoder.finish().map(drop)
    })?;
    Ok((kind.unwrap_or(GZIP), blob))
}

fn copy(layer: &LayerFile, to: &mut dyn Write) -> io::Result<()> {
    let mut buffer = vec![0; PIECE_BYTES];
    let (mut at, end) = (layer.offset, layer.offset + layer.bytes);
    while at < end {
        let most = buffer.len().min(usize::try_from(end - at).unwrap_or(usize::MAX));
        let read = layer.file.read_at(&mut buffer[..most], at)?;
        if read == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        to.write_all(&buffer[..read])?;
        at += read as u64;
    }
    Ok(())
}

/// An OCI layout that is to be written. Its files are open, so they stay whatever happens.
struct Layout {
    manifest: Vec<u8>,
    config: Descriptor,
    layers: Vec<(Descriptor, File)>,
    config_file: File,
}

impl Layout {
    fn open(blobs: &Blobs, manifest: &str) -> Result<Self, RegistryError> {
        let (parsed, mut text) = read_manifest(blobs, manifest)?;
        let config = parsed.config.of_oci();
        let layers: Vec<Descriptor> = parsed.layers.iter().map(Descriptor::of_oci).collect();
        let is_oci = parsed.media_type.as_deref().is_none_or(|kind| kind == MANIFEST);
        if !is_oci {
            let media_type = Some(MANIFEST.to_owned());
            let (config, layers) = (config.clone(), layers.clone());
            let manifest = Manifest { schema_version: 2, media_type, config, layers };
            text = json!(manifest).to_string().into_bytes();
        }
        let config_file = blobs.open(config.sha256())?;
        let with_file = |layer: Descriptor| Ok((layer.clone(), blobs.open(layer.sha256())?));
        let layers = layers.into_iter().map(with_file).collect::<Result<_, RegistryError>>()?;
        Ok(Self { manifest: text, config, layers, config_file })
    }

    fn write(self, name: &str, to: impl Write) -> io::Result<()> {
        let digest = hex::encode(ring::digest::digest(&SHA256, &self.manifest));
        let path = |sha256: &str| format!("blobs/sha256/{sha256}");
        let tags = tags(name);
        let index = json!({
            "schemaVersion": 2, "mediaType": INDEX,
            "manifests": [{
                "mediaType": MANIFEST, "digest": format!("sha256:{digest}"),
                "size": self.manifest.len(),
                "annotations": {
                    "io.containerd.image.name": tags.first().map_or(name, String::as_str),
                    "org.opencontainers.image.ref.name":
                        tags.first().and_then(|tag| tag.rsplit_once(':')).map_or(name, |it| it.1),
                },
            }],
        });
        let layers: Vec<String> = self.layers.iter().map(|(it, _)| path(it.sha256())).collect();
        let docker = json!([{
            "Config": path(self.config.sha256()), "RepoTags": tags, "Layers": layers,
        }]);
        let mut tar = Builder::new(to);
        for directory in ["blobs/", "blobs/sha256/"] {
            add(&mut tar, directory, EntryType::Directory, 0, io::empty())?;
        }
        let texts = [
            ("oci-layout", json!({ "imageLayoutVersion": "1.0.0" }).to_string().into_bytes()),
            ("index.json", index.to_string().into_bytes()),
            ("manifest.json", docker.to_string().into_bytes()),
            (&path(&digest), self.manifest),
        ];
        for (name, text) in texts {
            add(&mut tar, name, EntryType::Regular, text.len() as u64, &text[..])?;
        }
        let mut written = std::collections::BTreeSet::new();
        let config = (self.config, self.config_file);
        for (blob, file) in [config].into_iter().chain(self.layers) {
            // Equal layers are one file.
            if written.insert(blob.digest.clone()) {
                add(&mut tar, &path(blob.sha256()), EntryType::Regular, blob.size, file)?;
            }
        }
        tar.into_inner()?.flush()
    }
}

fn add(
    tar: &mut Builder<impl Write>,
    name: &str,
    kind: EntryType,
    bytes: u64,
    content: impl Read,
) -> io::Result<()> {
    let mut header = Header::new_ustar();
    header.set_entry_type(kind);
    header.set_mode(if kind.is_dir() { 0o755 } else { 0o644 });
    header.set_size(bytes);
    tar.append_data(&mut header, name, content.take(bytes))
}

/// Returns the tag by which Docker knows an image: its name, with `:latest` if it has no tag. An
/// image that is named by a digest has none.
fn tags(name: &str) -> Vec<String> {
    let Ok(reference) = name.parse::<Reference>() else { return Vec::new() };
    if reference.version().starts_with("sha256:") {
        Vec::new()
    } else {
        vec![reference.to_string()]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tag_is_a_whole_reference() {
        assert_eq!(tags("web"), ["docker.io/library/web:latest"]);
        assert_eq!(tags("127.0.0.1:5000/app:2"), ["127.0.0.1:5000/app:2"]);
        assert!(tags(&format!("app@sha256:{}", "a".repeat(64))).is_empty());
        assert!(tags("Not A Name").is_empty());
    }
}

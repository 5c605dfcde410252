//! What a registry says about an image: its index, its manifest and its layers.

use oci_spec::image::{Descriptor, ImageIndex, ImageManifest, MediaType};
use ring::digest::{SHA256, digest};
use serde::{Deserialize, Serialize};

use crate::error::RegistryError;

/// The media types of manifests and indexes, in the form of the header `Accept`.
pub(crate) const MANIFESTS: &str = "application/vnd.oci.image.manifest.v1+json, \
     application/vnd.oci.image.index.v1+json, \
     application/vnd.docker.distribution.manifest.v2+json, \
     application/vnd.docker.distribution.manifest.list.v2+json";

/// Maximum size of a manifest, an index or a configuration, in bytes.
pub(crate) const DESCRIPTION_BYTES_MAX: usize = 4 << 20;
/// Maximum number of layers.
const LAYERS_MAX: usize = 256;

/// Media types of layers that Docker's images have.
const DOCKER_LAYERS: [&str; 3] = [
    "application/vnd.docker.image.rootfs.diff.tar.gzip",
    "application/vnd.docker.image.rootfs.diff.tar.zstd",
    "application/vnd.docker.image.rootfs.diff.tar",
];
/// Media types of the configurations of images. Other artifacts have other types.
const CONFIGS: [&str; 2] =
    ["application/vnd.oci.image.config.v1+json", "application/vnd.docker.container.image.v1+json"];

/// A blob that an image consists of.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Blob {
    /// SHA-256 of the content, in hexadecimal.
    pub sha256: String,
    /// Size, in bytes.
    pub bytes: u64,
}

impl Blob {
    /// The digest in its usual form, `sha256:…`.
    #[must_use]
    pub fn digest(&self) -> String {
        format!("sha256:{}", self.sha256)
    }
}

/// An image for this host.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RemoteImage {
    /// Digest of the manifest, `sha256:…`.
    pub digest: String,
    /// The manifest: a JSON object.
    pub manifest: Vec<u8>,
    /// The configuration: a JSON object.
    pub config: Blob,
    /// The layers, lowest first. They may be compressed.
    pub layers: Vec<Blob>,
}

/// What a registry answers to a request for a manifest.
pub(crate) enum Description {
    /// An index, and the digest of the manifest for this host in it.
    Index(String),
    Image(RemoteImage),
}

/// Returns the digest of a content, `sha256:…`.
pub(crate) fn digest_of(content: &[u8]) -> String {
    format!("sha256:{}", hex::encode(digest(&SHA256, content)))
}

/// The fields that tell an index from a manifest.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Outline {
    schema_version: u32,
    manifests: Option<serde::de::IgnoredAny>,
}

/// Parses an index or a manifest. `reference` is for errors, `host` is who sent it.
pub(crate) fn parse(
    reference: &str,
    host: &str,
    content: &[u8],
) -> Result<Description, RegistryError> {
    let malformed = |what| move |_| RegistryError::Malformed { what, host: host.to_owned() };
    let outline: Outline = serde_json::from_slice(content).map_err(malformed("a manifest"))?;
    if outline.schema_version != 2 {
        return Err(unsupported(reference, "has a manifest of version 1; push it again"));
    }
    if outline.manifests.is_some() {
        let index: ImageIndex = serde_json::from_slice(content).map_err(malformed("an index"))?;
        return choose(reference, index.manifests()).map(Description::Index);
    }
    let manifest: ImageManifest =
        serde_json::from_slice(content).map_err(malformed("a manifest"))?;
    image(reference, content, &manifest).map(Description::Image)
}

fn unsupported(reference: &str, problem: impl Into<String>) -> RegistryError {
    RegistryError::Unsupported { reference: reference.to_owned(), problem: problem.into() }
}

fn image(
    reference: &str,
    content: &[u8],
    manifest: &ImageManifest,
) -> Result<RemoteImage, RegistryError> {
    let kind = manifest.config().media_type().to_string();
    if !CONFIGS.contains(&kind.as_str()) {
        return Err(unsupported(
            reference,
            format!("is not an image of a file system but `{kind}`"),
        ));
    }
    let layers = manifest.layers();
    if layers.is_empty() || layers.len() > LAYERS_MAX {
        let problem = format!("has {} layers; supported are 1 to {LAYERS_MAX}", layers.len());
        return Err(unsupported(reference, problem));
    }
    if let Some(other) = layers.iter().find(|layer| !is_layer(layer.media_type())) {
        let problem = format!("has a layer of the type `{}`", other.media_type());
        return Err(unsupported(reference, problem));
    }
    Ok(RemoteImage {
        digest: digest_of(content),
        manifest: content.to_vec(),
        config: blob(reference, manifest.config())?,
        layers: layers.iter().map(|layer| blob(reference, layer)).collect::<Result<_, _>>()?,
    })
}

fn is_layer(kind: &MediaType) -> bool {
    match kind {
        MediaType::ImageLayer
        | MediaType::ImageLayerGzip
        | MediaType::ImageLayerZstd
        | MediaType::ImageLayerNonDistributable
        | MediaType::ImageLayerNonDistributableGzip
        | MediaType::ImageLayerNonDistributableZstd => true,
        MediaType::Other(kind) => DOCKER_LAYERS.contains(&kind.as_str()),
        _ => false,
    }
}

fn blob(reference: &str, descriptor: &Descriptor) -> Result<Blob, RegistryError> {
    let digest = descriptor.digest().to_string();
    let sha256 = sha256_of(&digest);
    let sha256 =
        sha256.ok_or_else(|| unsupported(reference, format!("has the digest `{digest}`")))?;
    Ok(Blob { sha256: sha256.to_owned(), bytes: descriptor.size() })
}

/// Returns the hexadecimal digits of a digest; `None` if it is not SHA-256. They become the name
/// of a file.
fn sha256_of(digest: &str) -> Option<&str> {
    let is_digit = |byte: u8| matches!(byte, b'0'..=b'9' | b'a'..=b'f');
    let digits = digest.strip_prefix("sha256:")?;
    (digits.len() == 64 && digits.bytes().all(is_digit)).then_some(digits)
}

/// Chooses the manifest for this host from an index. Returns its digest.
fn choose(reference: &str, manifests: &[Descriptor]) -> Result<String, RegistryError> {
    let ours = match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    };
    let platform = |descriptor: &Descriptor| {
        let platform = descriptor.platform().as_ref()?;
        Some((platform.os().to_string(), platform.architecture().to_string()))
    };
    let fits = |descriptor: &&Descriptor| {
        platform(descriptor).is_none_or(|(os, architecture)| os == "linux" && architecture == ours)
    };
    if let Some(found) = manifests.iter().find(fits) {
        return Ok(found.digest().to_string());
    }
    let found = manifests.iter().filter_map(platform);
    // Attestations have no platform.
    let found = found.filter(|(os, _)| os != "unknown");
    let mut found: Vec<String> =
        found.map(|(os, architecture)| format!("{os}/{architecture}")).collect();
    found.dedup();
    found.truncate(20);
    Err(RegistryError::Platform { reference: reference.to_owned(), found })
}

#[cfg(test)]
mod tests {
    use super::*;

    const HEX: &str = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";

    fn manifest(config: &str, layer: &str) -> String {
        format!(
            r#"{{"schemaVersion":2,"config":{{"mediaType":"{config}","digest":"sha256:{HEX}","size":3}},
                "layers":[{{"mediaType":"{layer}","digest":"sha256:{HEX}","size":7}}]}}"#
        )
    }

    fn error(content: &str) -> String {
        parse("app:1", "r", content.as_bytes()).err().unwrap().to_string()
    }

    #[test]
    fn manifests_of_oci_and_docker_are_understood() {
        for (config, layer) in [
            (CONFIGS[0], "application/vnd.oci.image.layer.v1.tar+zstd"),
            (CONFIGS[1], DOCKER_LAYERS[0]),
        ] {
            let text = manifest(config, layer);
            let parsed = parse("app:1", "r", text.as_bytes()).unwrap();
            let Description::Image(image) = parsed else { panic!() };
            assert_eq!(image.digest, digest_of(text.as_bytes()));
            assert_eq!((image.config.bytes, image.layers[0].bytes), (3, 7));
            assert_eq!(image.layers[0].digest(), format!("sha256:{HEX}"));
        }
    }

    #[test]
    fn index_leads_to_the_image_of_this_host() {
        let entry = |os: &str, architecture: &str| {
            format!(
                r#"{{"mediaType":"{}","digest":"sha256:{HEX}","size":1,"platform":{{"os":"{os}","architecture":"{architecture}"}}}}"#,
                MediaType::ImageManifest
            )
        };
        let index = |entries: &[String]| {
            format!(r#"{{"schemaVersion":2,"manifests":[{}]}}"#, entries.join(","))
        };
        let ours = if cfg!(target_arch = "x86_64") { "amd64" } else { "arm64" };
        let text = index(&[entry("unknown", "unknown"), entry("linux", ours)]);
        assert!(matches!(parse("a", "r", text.as_bytes()), Ok(Description::Index(_))));
        let text =
            index(&[entry("windows", ours), entry("linux", "s390x"), entry("unknown", "unknown")]);
        assert_eq!(
            error(&text),
            format!("`app:1` is not for this host; it is for windows/{ours}, linux/s390x")
        );
    }

    #[test]
    fn other_content_is_refused() {
        assert!(error("{").contains("a manifest that is malformed"));
        assert!(error(r#"{"schemaVersion":1}"#).contains("version 1"));
        let chart = manifest("application/vnd.cncf.helm.config.v1+json", DOCKER_LAYERS[0]);
        assert!(error(&chart).contains("not an image of a file system"));
        let odd = manifest(CONFIGS[0], "application/x-brotli");
        assert!(error(&odd).contains("a layer of the type `application/x-brotli`"));
        let good = manifest(CONFIGS[0], DOCKER_LAYERS[0]);
        for odd in ["md5:00", "sha256:00", "sha256:E3", "sha256:../../x"] {
            let text = good.replace(&format!("sha256:{HEX}"), odd);
            assert!(parse("app:1", "r", text.as_bytes()).is_err(), "{odd}");
        }
    }
}

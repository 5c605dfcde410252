//! Finds the layers of an image in an archive: by the `manifest.json` of `docker save`, or by the
//! `index.json` of an OCI layout.
//!
//! Source: the OCI image specification, `image-layout.md`, `image-index.md` and `manifest.md`;
//! Docker's image specification 1.2.

use std::collections::HashMap;
use std::fs::File;
use std::io::Read;

use ring::digest::{Context, SHA256};
use serde::Deserialize;
use tar::{Archive, EntryType};

use super::{ArchiveError, Part, bad, check_extensions, explain};

/// Maximum of files in an image's archive. An archive with more files counts as a root file
/// system and is not searched further.
const FILES_MAX: usize = 10_000;
/// Maximum of layers in an image: Docker's own limit is 127.
const LAYERS_MAX: usize = 256;
/// Maximum of nested indexes before a manifest.
const INDEXES_MAX: usize = 4;

const DOCKER_MANIFEST: &str = "manifest.json";
const OCI_LAYOUT: &str = "oci-layout";
const OCI_INDEX: &str = "index.json";

/// One image in `manifest.json`.
#[derive(Debug, Deserialize)]
struct DockerImage {
    #[serde(rename = "Config")]
    config: String,
    #[serde(rename = "Layers")]
    layers: Vec<String>,
}

/// An OCI index, which has `manifests`, or an OCI manifest, which has `layers`.
#[derive(Debug, Deserialize)]
struct OciObject {
    #[serde(default)]
    manifests: Vec<Descriptor>,
    #[serde(default)]
    layers: Vec<Descriptor>,
    #[serde(default)]
    config: Option<Descriptor>,
}

/// The parts of an image in an archive.
#[derive(Debug)]
pub(super) struct Found<'file> {
    /// The layers, lowest first.
    pub(super) layers: Vec<Part<'file>>,
    /// The configuration, as JSON.
    pub(super) config: Vec<u8>,
}

#[derive(Clone, Debug, Deserialize)]
struct Descriptor {
    digest: String,
    #[serde(default)]
    platform: Option<Platform>,
}

#[derive(Clone, Debug, Deserialize)]
struct Platform {
    architecture: String,
    os: String,
}

impl Platform {
    /// Whether guests of this host can run the image. Attestations have the architecture
    /// `unknown`.
    fn is_ours(&self) -> bool {
        let ours = match std::env::consts::ARCH {
            "x86_64" => "amd64",
            "aarch64" => "arm64",
            other => other,
        };
        self.os == "linux" && self.architecture == ours
    }
}

/// The files of an archive, by name.
struct Files<'file>(HashMap<String, Part<'file>>);

/// Finds the image in an archive. Returns `None` if the archive is that of a root file system.
///
/// # Errors
///
/// Returns an error if the image's description is wrong, or if the archive has several images.
pub(super) fn find(archive: &File) -> Result<Option<Found<'_>>, ArchiveError> {
    let Some(files) = Files::read(archive)? else { return Ok(None) };
    if files.0.contains_key(OCI_LAYOUT) && files.0.contains_key(OCI_INDEX) {
        return files.oci_image().map(Some);
    }
    if files.0.contains_key(DOCKER_MANIFEST) {
        return files.docker_image();
    }
    Ok(None)
}

impl<'file> Files<'file> {
    /// Reads the names of an archive. Returns `None` if it has too many files for an image.
    fn read(archive: &'file File) -> Result<Option<Self>, ArchiveError> {
        let whole = Part::whole(archive)?;
        let failed = |error| explain(&error);
        check_extensions(whole.reader()).map_err(failed)?;
        let mut reader = Archive::new(whole.reader());
        let (mut files, mut links) = (HashMap::new(), Vec::new());
        for entry in reader.entries().map_err(failed)? {
            let entry = match entry {
                Ok(entry) => entry,
                // Stop here, because `tar` would decompress or otherwise interpret other formats,
                // without a limit.
                Err(_) if files.is_empty() && links.is_empty() => {
                    return Err(bad("it is not a tar archive"));
                }
                Err(error) => return Err(failed(error)),
            };
            let name =
                String::from_utf8_lossy(&entry.path_bytes()).trim_start_matches("./").to_owned();
            match entry.header().entry_type() {
                EntryType::Regular | EntryType::Continuous => {
                    let part = Part {
                        file: archive,
                        offset: entry.raw_file_position(),
                        bytes: entry.size(),
                    };
                    files.insert(name, part);
                }
                // An older `docker save` stores each layer once, with links to it.
                EntryType::Symlink | EntryType::Link => {
                    let target = entry.link_name_bytes().unwrap_or_default();
                    links.push((name, String::from_utf8_lossy(&target).into_owned()));
                }
                _ => {}
            }
            if files.len() + links.len() > FILES_MAX {
                return Ok(None);
            }
        }
        for (name, target) in links {
            let target = target.trim_start_matches("../").to_owned();
            if let Some(part) = files.get(&target).cloned() {
                files.insert(name, part);
            }
        }
        Ok(Some(Self(files)))
    }

    fn get(&self, name: &str) -> Result<&Part<'file>, ArchiveError> {
        self.0.get(name).ok_or_else(|| bad(format!("the image's file `{name}` is missing")))
    }

    fn json<T: for<'text> Deserialize<'text>>(&self, name: &str) -> Result<T, ArchiveError> {
        let text = self.get(name)?.read_small()?;
        serde_json::from_slice(&text)
            .map_err(|error| bad(format!("`{name}` cannot be read: {error}")))
    }

    /// Returns `None` if the file is not Docker's: a root file system may have a `manifest.json`,
    /// too.
    fn docker_image(&self) -> Result<Option<Found<'file>>, ArchiveError> {
        let Ok(images) = self.json::<Vec<DockerImage>>(DOCKER_MANIFEST) else { return Ok(None) };
        let [image] = &images[..] else {
            return Err(bad(format!(
                "it has {} images; save one: docker save IMAGE",
                images.len()
            )));
        };
        check_number(image.layers.len())?;
        let layers = image.layers.iter().map(|layer| self.get(layer).cloned());
        let config = self.get(&image.config)?.read_small()?;
        Ok(Some(Found { layers: layers.collect::<Result<_, _>>()?, config }))
    }

    fn oci_image(&self) -> Result<Found<'file>, ArchiveError> {
        let mut object: OciObject = self.json(OCI_INDEX)?;
        for _ in 0..INDEXES_MAX {
            if object.manifests.is_empty() {
                check_number(object.layers.len())?;
                let config = object.config.ok_or_else(|| bad("the image has no configuration"))?;
                let config = self.blob(&config.digest)?.read_small()?;
                let layers = object.layers.iter().map(|layer| self.blob(&layer.digest));
                return Ok(Found { layers: layers.collect::<Result<_, _>>()?, config });
            }
            let image = choose(&object.manifests)?;
            let name = blob_name(&image.digest)?;
            self.blob(&image.digest)?;
            object = self.json(&name)?;
        }
        Err(bad("its indexes do not lead to an image"))
    }

    /// Returns a blob after checking its content against its digest.
    fn blob(&self, digest: &str) -> Result<Part<'file>, ArchiveError> {
        let part = self.get(&blob_name(digest)?)?;
        let mut hash = Context::new(&SHA256);
        let mut reader = part.reader();
        let mut buffer = vec![0; 1 << 16];
        loop {
            let read = reader.read(&mut buffer)?;
            if read == 0 {
                break;
            }
            hash.update(&buffer[..read]);
        }
        let found = hex::encode(hash.finish());
        if digest != format!("sha256:{found}") {
            return Err(bad(format!(
                "the content of `{digest}` has another digest: sha256:{found}"
            )));
        }
        Ok(part.clone())
    }
}

/// The image for this host.
fn choose(images: &[Descriptor]) -> Result<&Descriptor, ArchiveError> {
    let mut ours: Vec<&Descriptor> = images
        .iter()
        .filter(|image| image.platform.as_ref().is_none_or(Platform::is_ours))
        .collect();
    // An image with several tags has a descriptor for each.
    ours.sort_by(|one, other| one.digest.cmp(&other.digest));
    ours.dedup_by(|one, other| one.digest == other.digest);
    match ours[..] {
        [one] => Ok(one),
        [] => {
            let found: Vec<String> = (images.iter().filter_map(|image| image.platform.as_ref()))
                .map(|platform| format!("{}/{}", platform.os, platform.architecture))
                .collect();
            Err(bad(format!("it has no image for this host, only for {}", found.join(", "))))
        }
        _ => Err(bad(format!("it has {} images for this host; export one", ours.len()))),
    }
}

fn blob_name(digest: &str) -> Result<String, ArchiveError> {
    let hex = digest
        .strip_prefix("sha256:")
        .filter(|hex| hex.len() == 64 && hex.bytes().all(|it| it.is_ascii_hexdigit()));
    let hex = hex.ok_or_else(|| bad(format!("`{digest}` is not a SHA-256 digest")))?;
    Ok(format!("blobs/sha256/{hex}"))
}

fn check_number(layers: usize) -> Result<(), ArchiveError> {
    match layers {
        0 => Err(bad("the image has no layers")),
        1..=LAYERS_MAX => Ok(()),
        _ => Err(bad(format!("the image has {layers} layers; at most {LAYERS_MAX} are allowed"))),
    }
}

#[cfg(test)]
mod tests {
    use tar::{Builder, Header};

    use super::*;

    fn archive(files: &[(&str, &[u8])]) -> File {
        let mut builder = Builder::new(tempfile::tempfile().unwrap());
        for (name, content) in files {
            let mut header = Header::new_gnu();
            header.set_size(content.len() as u64);
            builder.append_data(&mut header, name, *content).unwrap();
        }
        builder.into_inner().unwrap()
    }

    fn digest(content: &[u8]) -> String {
        hex::encode(ring::digest::digest(&SHA256, content))
    }

    /// Returns the contents of the layers in an archive.
    fn found(archive: &File) -> Result<Option<Vec<Vec<u8>>>, ArchiveError> {
        let image = find(archive)?;
        image.map(|image| image.layers.iter().map(Part::read_small).collect()).transpose()
    }

    #[test]
    fn layers_are_found_in_docker_save_but_not_in_a_root_file_system() {
        let manifest =
            br#"[{"Config":"c.json","RepoTags":["x:1"],"Layers":["a/layer.tar","b/layer.tar"]}]"#;
        let saved = archive(&[
            ("a/layer.tar", b"A"),
            ("b/layer.tar", b"B"),
            ("c.json", b"{}"),
            ("manifest.json", manifest),
        ]);
        assert_eq!(found(&saved).unwrap(), Some(vec![b"A".to_vec(), b"B".to_vec()]));
        assert_eq!(found(&archive(&[("bin/sh", b"x"), ("manifest.json", b"{}")])).unwrap(), None);

        let two = br#"[{"Config":"c","Layers":["a"]},{"Config":"c","Layers":["a"]}]"#;
        let error = found(&archive(&[("a", b"A"), ("manifest.json", two)])).unwrap_err();
        assert!(error.to_string().contains("2 images"), "{error}");
        let missing = br#"[{"Config":"c","Layers":["gone"]}]"#;
        let error = found(&archive(&[("c", b"{}"), ("manifest.json", missing)])).unwrap_err();
        assert!(error.to_string().contains("`gone`"), "{error}");
    }

    #[test]
    fn oci_layout_selects_the_image_of_this_host_and_checks_digests() {
        let layer = b"a layer";
        let blob = |content: &[u8]| format!("blobs/sha256/{}", digest(content));
        let config = b"{}";
        let manifest = format!(
            r#"{{"config":{{"digest":"sha256:{}"}},"layers":[{{"digest":"sha256:{}"}}]}}"#,
            digest(config),
            digest(layer)
        );
        let index = |architecture: &str| {
            format!(
                r#"{{"manifests":[{{"digest":"sha256:{}","platform":{{"os":"linux","architecture":"{architecture}"}}}},
                    {{"digest":"sha256:{}","platform":{{"os":"unknown","architecture":"unknown"}}}}]}}"#,
                digest(manifest.as_bytes()),
                digest(b"attestation"),
            )
        };
        let ours = if cfg!(target_arch = "x86_64") { "amd64" } else { "arm64" };
        let blobs = [manifest.as_bytes(), layer, config].map(blob);
        let [manifest_blob, layer_blob, config_blob] = &blobs;
        let with = |index: &str, content: &[u8]| {
            archive(&[
                ("oci-layout", br#"{"imageLayoutVersion":"1.0.0"}"#),
                ("index.json", index.as_bytes()),
                (manifest_blob, manifest.as_bytes()),
                (config_blob, config),
                (layer_blob, content),
            ])
        };

        assert_eq!(found(&with(&index(ours), layer)).unwrap(), Some(vec![layer.to_vec()]));
        // An image with two tags has two descriptors.
        let one = index(ours);
        let first = one.split_once('[').unwrap().1.split_once("}},").unwrap().0;
        let twice = format!(r#"{{"manifests":[{first}}}}},{first}}}}}]}}"#);
        assert_eq!(found(&with(&twice, layer)).unwrap(), Some(vec![layer.to_vec()]));
        let error = found(&with(&index("s390x"), layer)).unwrap_err();
        assert!(error.to_string().contains("linux/s390x"), "{error}");
        let error = found(&with(&index(ours), b"another layer")).unwrap_err();
        assert!(error.to_string().contains("another digest"), "{error}");
    }
}

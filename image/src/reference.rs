//! Names of images. Registry references are read as Docker reads them (distribution's reference grammar):
//! `python` is `docker.io/library/python:latest`. `oci:`, `docker-archive:` and `dir:` name local images, as
//! skopeo writes them.
use std::{
    fmt,
    path::{Path, PathBuf},
    str::FromStr,
};

use crate::{Digest, Error};

const DEFAULT_REGISTRY: &str = "docker.io";
const DEFAULT_TAG: &str = "latest";
/// distribution's `NameTotalLengthMax`: registry and repository together.
const NAME_MAX: usize = 255;
const TAG_MAX: usize = 128;

/// What image is meant, in full. Displays in its normal form, which parses to the same value.
///
/// ```
/// use cubby_image::Reference;
/// let reference: Reference = "python:3.12".parse()?;
/// assert_eq!(reference.to_string(), "docker.io/library/python:3.12");
/// let reference: Reference = "localhost:5000/py".parse()?;
/// assert_eq!(reference.to_string(), "localhost:5000/py:latest");
/// # Ok::<(), cubby_image::Error>(())
/// ```
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Reference {
    /// In a registry.
    Registry {
        /// `host` or `host:port`.
        registry: String,
        /// The path below it, such as `library/python`.
        repository: String,
        /// The tag; `latest` unless a tag or a digest was given.
        tag: Option<String>,
        /// The manifest's digest; it decides where both are given.
        digest: Option<Digest>,
    },
    /// An OCI image layout: a directory with `index.json`.
    Oci {
        /// The directory.
        path: PathBuf,
        /// Which of its images (`org.opencontainers.image.ref.name`); needed if there are several.
        tag: Option<String>,
    },
    /// A file that `docker save` wrote.
    DockerArchive {
        /// The file.
        path: PathBuf,
        /// Which of its images; needed if there are several.
        tag: Option<String>,
    },
    /// A directory with `manifest.json` and blobs named by their hash, as skopeo's `dir:` writes it.
    Dir {
        /// The directory.
        path: PathBuf,
    },
}

impl Reference {
    /// The same with its path, if it has one, absolute: what it means in every directory.
    #[must_use]
    pub fn absolute(&self) -> Self {
        let absolute = |path: &Path| std::path::absolute(path).unwrap_or_else(|_| path.to_owned());
        match self.clone() {
            Self::Oci { path, tag } => Self::Oci { path: absolute(&path), tag },
            Self::DockerArchive { path, tag } => Self::DockerArchive { path: absolute(&path), tag },
            Self::Dir { path } => Self::Dir { path: absolute(&path) },
            registry => registry,
        }
    }
}

impl FromStr for Reference {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        let refused = |why| Error::Reference { reference: text.chars().take(512).collect(), why };
        if let Some(rest) = text.strip_prefix("oci:") {
            let (path, tag) = path_and_tag(rest).ok_or_else(|| refused("oci: needs a directory"))?;
            return Ok(Self::Oci { path, tag });
        }
        if let Some(rest) = text.strip_prefix("docker-archive:") {
            let (path, tag) = path_and_tag(rest).ok_or_else(|| refused("docker-archive: needs a file"))?;
            return Ok(Self::DockerArchive { path, tag });
        }
        if let Some(path) = text.strip_prefix("dir:") {
            if path.is_empty() {
                return Err(refused("dir: needs a directory"));
            }
            return Ok(Self::Dir { path: PathBuf::from(path) });
        }
        let text = text.strip_prefix("docker://").unwrap_or(text);
        registry_reference(text).map_err(refused)
    }
}

fn registry_reference(text: &str) -> Result<Reference, &'static str> {
    if text.is_empty() {
        return Err("it is empty");
    }
    let (rest, digest) = match text.split_once('@') {
        Some((rest, digest)) => (rest, Some(digest.parse().map_err(|_| "what follows `@` is not a digest")?)),
        None => (text, None),
    };
    let (name, tag) = match rest.rsplit_once(':') {
        // A colon before a slash belongs to a port.
        Some((name, tag)) if !tag.contains('/') => (name, Some(tag)),
        _ => (rest, None),
    };
    if tag.is_some_and(|tag| !is_tag(tag)) {
        return Err(
            "a tag has letters, digits, `_`, `.` and `-`, at most 128, and begins with none of the last two",
        );
    }
    let (registry, path) = match name.split_once('/') {
        Some((host, path)) if looks_like_host(host) => (host, path),
        _ => (DEFAULT_REGISTRY, name),
    };
    // What Docker's own references were once called.
    let registry = if registry == "index.docker.io" { DEFAULT_REGISTRY } else { registry };
    if !is_host(registry) {
        return Err("the registry is not a host name or address with an optional port");
    }
    if path.bytes().any(|byte| byte.is_ascii_uppercase()) {
        return Err("a repository's name is in lower case");
    }
    if !path.split('/').all(is_component) {
        return Err(
            "a repository's name has lower-case letters and digits, with single `.`, `_`, `__` or `-` between them",
        );
    }
    let repository = if registry == DEFAULT_REGISTRY && !path.contains('/') {
        format!("library/{path}")
    } else {
        path.to_owned()
    };
    if registry.len() + 1 + repository.len() > NAME_MAX {
        return Err("the name is longer than 255 characters");
    }
    let tag = match (tag, &digest) {
        (None, None) => Some(DEFAULT_TAG.to_owned()),
        (tag, _) => tag.map(str::to_owned),
    };
    Ok(Reference::Registry { registry: registry.to_owned(), repository, tag, digest })
}

/// As Docker tells a registry from the first part of a name.
fn looks_like_host(text: &str) -> bool {
    text == "localhost" || text.contains(['.', ':']) || text.bytes().any(|byte| byte.is_ascii_uppercase())
}

fn is_host(text: &str) -> bool {
    let (host, port) = match text.strip_prefix('[').and_then(|rest| rest.split_once(']')) {
        Some((address, rest)) => {
            if address.parse::<std::net::Ipv6Addr>().is_err() {
                return false;
            }
            (None, rest)
        }
        None => {
            let end = text.find(':').unwrap_or(text.len());
            let (host, rest) = text.split_at(end);
            (Some(host), rest)
        }
    };
    let label = |label: &str| {
        let inner = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'-';
        !label.is_empty() && label.bytes().all(inner) && !label.starts_with('-') && !label.ends_with('-')
    };
    let port_is_valid = match port.strip_prefix(':') {
        Some(digits) => {
            digits.bytes().all(|byte| byte.is_ascii_digit())
                && digits.parse::<u16>().is_ok_and(|port| port > 0)
        }
        None => port.is_empty(),
    };
    host.is_none_or(|host| host.split('.').all(label)) && port_is_valid
}

/// `[a-z0-9]+` joined by `.`, `_`, `__` or any number of `-`.
fn is_component(text: &str) -> bool {
    let alphanumeric = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit();
    let mut separators = text
        .split(|c: char| c.is_ascii() && u8::try_from(c).is_ok_and(alphanumeric))
        .filter(|part| !part.is_empty());
    let ends = |byte: Option<&u8>| byte.is_some_and(|&byte| alphanumeric(byte));
    ends(text.as_bytes().first())
        && ends(text.as_bytes().last())
        && separators.all(|part| matches!(part, "." | "_" | "__") || part.bytes().all(|byte| byte == b'-'))
}

fn is_tag(text: &str) -> bool {
    let word = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'_';
    text.len() <= TAG_MAX
        && text.bytes().next().is_some_and(word)
        && text.bytes().all(|byte| word(byte) || byte == b'.' || byte == b'-')
}

/// `PATH[:TAG]`; an existing path with a colon in it is taken whole.
fn path_and_tag(text: &str) -> Option<(PathBuf, Option<String>)> {
    if text.is_empty() {
        return None;
    }
    match text.split_once(':') {
        Some((path, tag)) if !path.is_empty() && !tag.is_empty() && !Path::new(text).exists() => {
            Some((PathBuf::from(path), Some(tag.to_owned())))
        }
        _ => Some((PathBuf::from(text), None)),
    }
}

impl fmt::Display for Reference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let tagged = |f: &mut fmt::Formatter<'_>, tag: &Option<String>| match tag {
            Some(tag) => write!(f, ":{tag}"),
            None => Ok(()),
        };
        match self {
            Self::Registry { registry, repository, tag, digest } => {
                write!(f, "{registry}/{repository}")?;
                tagged(f, tag)?;
                match digest {
                    Some(digest) => write!(f, "@{digest}"),
                    None => Ok(()),
                }
            }
            Self::Oci { path, tag } => {
                write!(f, "oci:{}", path.display())?;
                tagged(f, tag)
            }
            Self::DockerArchive { path, tag } => {
                write!(f, "docker-archive:{}", path.display())?;
                tagged(f, tag)
            }
            Self::Dir { path } => write!(f, "dir:{}", path.display()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn normal(text: &str) -> String {
        text.parse::<Reference>().unwrap().to_string()
    }

    #[test]
    fn docker_would_read_it_so() {
        let digest = format!("sha256:{}", "a".repeat(64));
        for (text, expected) in [
            ("python", "docker.io/library/python:latest"),
            ("python:3.12", "docker.io/library/python:3.12"),
            ("user/app", "docker.io/user/app:latest"),
            ("index.docker.io/app", "docker.io/library/app:latest"),
            ("docker.io/app", "docker.io/library/app:latest"),
            ("ghcr.io/a/b/c:v1", "ghcr.io/a/b/c:v1"),
            ("localhost/app", "localhost/app:latest"),
            ("localhost:5000/py", "localhost:5000/py:latest"),
            ("127.0.0.1:5000/a:b", "127.0.0.1:5000/a:b"),
            ("[::1]:5000/a", "[::1]:5000/a:latest"),
            ("Registry.Example/a", "Registry.Example/a:latest"),
            ("a__b/c--d.e", "docker.io/a__b/c--d.e:latest"),
            ("app:_x.Y-z", "docker.io/library/app:_x.Y-z"),
            ("docker://alpine", "docker.io/library/alpine:latest"),
        ] {
            assert_eq!(normal(text), expected);
            assert_eq!(normal(expected), expected);
        }
        assert_eq!(normal(&format!("a@{digest}")), format!("docker.io/library/a@{digest}"));
        assert_eq!(normal(&format!("h:1/a:t@{digest}")), format!("h:1/a:t@{digest}"));
    }

    #[test]
    fn what_docker_refuses_is_refused() {
        let long = "a/".repeat(130) + "a";
        for text in [
            "",
            ":tag",
            "app:",
            "App",
            "a..b",
            "a___b",
            "-a",
            "a-",
            "a//b",
            "/a",
            "a/",
            "app:-x",
            "app@sha256:12",
            "a b",
            "h:0/a",
            "h:99999/a",
            "-h.x/a",
            "[::g]:1/a",
            "localhost:x/a",
            "app:a:b",
            "../etc",
            "a/../b",
            long.as_str(),
            "oci:",
            "dir:",
        ] {
            assert!(text.parse::<Reference>().is_err(), "{text}");
        }
    }

    #[test]
    fn local_images_have_paths_and_tags() {
        let oci = Reference::Oci { path: "/a/b".into(), tag: Some("v1:x".into()) };
        assert_eq!("oci:/a/b:v1:x".parse::<Reference>().unwrap(), oci);
        let archive = Reference::DockerArchive { path: "x.tar".into(), tag: None };
        assert_eq!("docker-archive:x.tar".parse::<Reference>().unwrap(), archive);
        assert_eq!(normal("dir:/x:y"), "dir:/x:y");
    }
}

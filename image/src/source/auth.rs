//! Who we are for a registry: credentials as `docker login` keeps them, and the challenges with which registries
//! ask for them (RFC 7235; distribution's token authentication specification).
//!
//! Not supported: credential helpers (`credsStore`, `credHelpers`), which are programs of their own.
use std::{collections::BTreeMap, env, fs, path::PathBuf};

use base64::{Engine, engine::general_purpose::STANDARD};
use serde::Deserialize;

use crate::{Credentials, PullOptions};

/// What `docker login` writes for Docker's own registry.
const DOCKER_HUB: &str = "https://index.docker.io/v1/";

#[derive(Deserialize)]
struct ConfigFile {
    #[serde(default)]
    auths: BTreeMap<String, Auth>,
}

#[derive(Deserialize, Default)]
#[serde(default)]
struct Auth {
    auth: String,
    username: String,
    password: String,
}

/// Credentials for `registry`: the caller's, or those of `docker login`, or none.
pub(super) fn credentials(registry: &str, options: &PullOptions) -> Option<Credentials> {
    if options.credentials.is_some() {
        return options.credentials.clone();
    }
    let path = options.docker_config.clone().or_else(|| {
        let dir = env::var_os("DOCKER_CONFIG").map(PathBuf::from);
        Some(dir.or_else(|| Some(env::home_dir()?.join(".docker")))?.join("config.json"))
    })?;
    // A file that is not there or not Docker's is as good as none: most images need no credentials.
    let file: ConfigFile = serde_json::from_slice(&fs::read(path).ok()?).ok()?;
    let key = if registry == "docker.io" { DOCKER_HUB } else { registry };
    let entry = file.auths.iter().find(|(name, _)| name.as_str() == key || host(name) == registry);
    decode(entry?.1)
}

/// Keys may be addresses: `https://host/v1/`.
fn host(key: &str) -> &str {
    let rest = key.strip_prefix("https://").or_else(|| key.strip_prefix("http://")).unwrap_or(key);
    rest.split('/').next().unwrap_or_default()
}

fn decode(auth: &Auth) -> Option<Credentials> {
    if !auth.username.is_empty() {
        return Some(Credentials { username: auth.username.clone(), password: auth.password.clone() });
    }
    let text = String::from_utf8(STANDARD.decode(&auth.auth).ok()?).ok()?;
    let (username, password) = text.split_once(':')?;
    Some(Credentials { username: username.to_owned(), password: password.trim_end_matches('\0').to_owned() })
}

/// The value of an `Authorization` header for basic authentication (RFC 7617).
pub(super) fn basic(credentials: &Credentials) -> String {
    format!("Basic {}", STANDARD.encode(format!("{}:{}", credentials.username, credentials.password)))
}

/// How a registry wants to be convinced.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Challenge {
    Basic,
    Bearer {
        /// Where tokens are given out.
        realm: String,
        service: Option<String>,
        scope: Option<String>,
    },
}

impl Challenge {
    /// The first challenge in a `WWW-Authenticate` header that we can meet; bearer tokens before passwords.
    pub(super) fn parse(header: &str) -> Option<Self> {
        let mut basic = None;
        for (scheme, parameters) in schemes(header) {
            let get = |name: &str| {
                parameters.iter().find(|(key, _)| key.eq_ignore_ascii_case(name)).map(|(_, v)| v.clone())
            };
            if scheme.eq_ignore_ascii_case("bearer")
                && let Some(realm) = get("realm")
            {
                return Some(Self::Bearer { realm, service: get("service"), scope: get("scope") });
            }
            if scheme.eq_ignore_ascii_case("basic") {
                basic = Some(Self::Basic);
            }
        }
        basic
    }
}

type Parameters = Vec<(String, String)>;

/// Splits a header into schemes and their parameters; commas separate both.
fn schemes(header: &str) -> Vec<(String, Parameters)> {
    let mut all: Vec<(String, Parameters)> = Vec::new();
    for part in split_unquoted(header) {
        let part = part.trim();
        let name_end = part.find([' ', '=']).unwrap_or(part.len());
        let (head, rest) = part.split_at(name_end);
        let parameter = if rest.starts_with('=') {
            part
        } else {
            all.push((head.to_owned(), Vec::new()));
            rest.trim_start()
        };
        if let (Some((key, value)), Some((_, parameters))) = (parameter.split_once('='), all.last_mut()) {
            let value = value.trim();
            let value = value.strip_prefix('"').and_then(|v| v.strip_suffix('"')).unwrap_or(value);
            parameters.push((key.trim().to_owned(), value.replace("\\\"", "\"")));
        }
    }
    all
}

fn split_unquoted(text: &str) -> Vec<&str> {
    let mut quoted = false;
    let mut escaped = false;
    text.split(|c: char| {
        match c {
            _ if escaped => escaped = false,
            '\\' if quoted => escaped = true,
            '"' => quoted = !quoted,
            ',' => return !quoted,
            _ => {}
        }
        false
    })
    .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn challenges_of_real_registries_are_understood() {
        let hub = r#"Bearer realm="https://auth.docker.io/token",service="registry.docker.io",scope="repository:a/b:pull,push""#;
        let expected = Challenge::Bearer {
            realm: "https://auth.docker.io/token".to_owned(),
            service: Some("registry.docker.io".to_owned()),
            scope: Some("repository:a/b:pull,push".to_owned()),
        };
        assert_eq!(Challenge::parse(hub), Some(expected));
        assert_eq!(Challenge::parse(r#"Basic realm="Registry, \"Realm\"""#), Some(Challenge::Basic));
        let both = r#"Basic realm="x", bearer Realm=https://t/"#;
        assert!(
            matches!(Challenge::parse(both), Some(Challenge::Bearer { realm, .. }) if realm == "https://t/")
        );
        for none in ["", "Negotiate", "Bearer", "Bearer service=\"x\"", "=,=,\"", "NTLM abc=="] {
            assert_eq!(Challenge::parse(none), None, "{none}");
        }
    }

    #[test]
    fn docker_login_is_honoured() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("config.json");
        let auth = STANDARD.encode("user:pa:ss");
        let json = format!(
            r#"{{"credsStore":"x","auths":{{"localhost:5000":{{"auth":"{auth}"}},"https://index.docker.io/v1/":{{"auth":"{auth}"}},"h":{{}}}}}}"#
        );
        fs::write(&path, json).unwrap();
        let options = PullOptions { docker_config: Some(path), ..PullOptions::default() };
        let expected = Credentials { username: "user".to_owned(), password: "pa:ss".to_owned() };
        assert_eq!(credentials("localhost:5000", &options), Some(expected.clone()));
        assert_eq!(credentials("docker.io", &options), Some(expected.clone()));
        assert_eq!(credentials("h", &options), None);
        assert_eq!(credentials("elsewhere", &options), None);
        assert_eq!(basic(&expected), "Basic dXNlcjpwYTpzcw==");
        assert!(!format!("{expected:?}").contains("pa:ss"));
    }
}

//! Registries (OCI distribution-spec): manifests by tag or digest, blobs by digest and range, with the
//! authentication that the registry asks for.
//!
//! HTTPS, except with loopback addresses and registries named insecure. A token is asked for over HTTPS where
//! the registry is spoken to so; credentials go to the registry and the token service it names only, never to
//! where a redirect leads.
use std::{
    io::Read,
    net::IpAddr,
    sync::{Mutex, PoisonError},
    time::Duration,
};

use serde::Deserialize;
use ureq::{
    Agent, Body,
    config::{Config, RedirectAuthHeaders},
    http::{HeaderMap, Response, StatusCode, header},
    tls::{PemItem, RootCerts, TlsConfig, parse_pem},
};

use super::auth::{self, Challenge};
use crate::{
    Credentials, Digest, Error, PullOptions,
    manifest::{ACCEPT, Context, Descriptor, Picked},
};

/// A server that says nothing for this long is gone.
const SILENCE: Duration = Duration::from_secs(20);
const CONNECT: Duration = Duration::from_secs(10);
/// Bytes of an answer that is not content: tokens, error messages.
const SMALL: u64 = 1 << 20;

/// A repository of a registry.
pub(crate) struct Registry {
    agent: Agent,
    /// As in the reference.
    name: String,
    /// Scheme and host.
    base: String,
    repository: String,
    secure: bool,
    credentials: Option<Credentials>,
    /// What convinced the registry last.
    authorization: Mutex<Option<String>>,
}

#[derive(Deserialize)]
struct Token {
    #[serde(default)]
    token: String,
    #[serde(default)]
    access_token: String,
}

impl Registry {
    /// Prepares to talk to `registry` about `repository`; nothing is sent yet.
    pub(crate) fn new(registry: &str, repository: &str, options: &PullOptions) -> Result<Self, Error> {
        let local = is_loopback(registry);
        let secure = !local && !options.insecure_registries.iter().any(|host| host == registry);
        let host = if registry == "docker.io" { "registry-1.docker.io" } else { registry };
        let mut tls = TlsConfig::builder();
        if let Some(path) = &options.ca_file {
            let pem = std::fs::read(path).map_err(Error::io("read", path))?;
            let certificates: Vec<_> = parse_pem(&pem)
                .filter_map(|item| match item {
                    Ok(PemItem::Certificate(certificate)) => Some(certificate),
                    _ => None,
                })
                .collect();
            tls = tls.root_certs(RootCerts::new_with_certs(&certificates));
        }
        let mut config = Config::builder()
            .http_status_as_error(false)
            .https_only(secure)
            .tls_config(tls.build())
            .redirect_auth_headers(RedirectAuthHeaders::SameHost)
            .user_agent(concat!("cubbyhole/", env!("CARGO_PKG_VERSION")))
            .accept_encoding("identity")
            .timeout_resolve(Some(CONNECT))
            .timeout_connect(Some(CONNECT))
            .timeout_recv_response(Some(SILENCE))
            .timeout_per_read(Some(SILENCE));
        if local {
            config = config.proxy(None);
        }
        Ok(Self {
            agent: config.build().new_agent(),
            name: registry.to_owned(),
            base: format!("{}://{host}", if secure { "https" } else { "http" }),
            repository: repository.to_owned(),
            secure,
            credentials: auth::credentials(registry, options),
            authorization: Mutex::new(None),
        })
    }

    /// The manifest that `digest`, or else `tag`, names, followed to the platform's.
    pub(crate) fn pick(
        &self,
        tag: Option<&str>,
        digest: Option<&Digest>,
        context: &Context<'_>,
    ) -> Result<Picked, Error> {
        let name = digest
            .map(Digest::to_string)
            .or_else(|| tag.map(str::to_owned))
            .unwrap_or_else(|| "latest".to_owned());
        let response = self.get(&self.manifest_url(&name), ACCEPT, None, context.reference)?;
        let claimed = response.headers().get("docker-content-digest").and_then(|value| value.to_str().ok());
        let claimed = claimed.and_then(|text| text.parse::<Digest>().ok());
        let bytes = self.body(response, context.limits.max_manifest)?;
        let actual = match digest.or(claimed.as_ref()) {
            Some(expected) => {
                expected.verify(&bytes, "a manifest")?;
                expected.clone()
            }
            None => Digest::sha256(&bytes),
        };
        context.pick(bytes, actual, &|descriptor| {
            let response = self.get(
                &self.manifest_url(&descriptor.digest.to_string()),
                ACCEPT,
                None,
                context.reference,
            )?;
            self.body(response, descriptor.size)
        })
    }

    /// A small blob; its digest is not checked here.
    pub(crate) fn document(&self, descriptor: &Descriptor) -> Result<Vec<u8>, Error> {
        let what = descriptor.digest.to_string();
        let response = self.get(&self.blob_url(&descriptor.digest), "*/*", None, &what)?;
        self.body(response, descriptor.size)
    }

    /// A blob's bytes from `start` on. The answer is whole (status 200) where the registry knows no ranges.
    pub(super) fn blob(&self, digest: &Digest, start: u64) -> Result<Response<Body>, Error> {
        let range = (start > 0).then(|| format!("bytes={start}-"));
        self.get(&self.blob_url(digest), "*/*", range.as_deref(), &digest.to_string())
    }

    fn manifest_url(&self, name: &str) -> String {
        format!("{}/v2/{}/manifests/{name}", self.base, self.repository)
    }

    pub(super) fn blob_url(&self, digest: &Digest) -> String {
        format!("{}/v2/{}/blobs/{digest}", self.base, self.repository)
    }

    /// Asks, and once more with what the registry wants to see. `what` is named if it is not found.
    fn get(&self, url: &str, accept: &str, range: Option<&str>, what: &str) -> Result<Response<Body>, Error> {
        let known = self.authorization.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let mut response = self.send(url, accept, range, known.as_deref())?;
        if response.status() == StatusCode::UNAUTHORIZED {
            let authorization = self.authorize(response.headers())?;
            response = self.send(url, accept, range, Some(&authorization))?;
            if response.status() != StatusCode::UNAUTHORIZED {
                *self.authorization.lock().unwrap_or_else(PoisonError::into_inner) = Some(authorization);
            }
        }
        match response.status() {
            StatusCode::OK | StatusCode::PARTIAL_CONTENT | StatusCode::RANGE_NOT_SATISFIABLE => Ok(response),
            StatusCode::NOT_FOUND => {
                Err(Error::NotFound { reference: what.to_owned(), registry: self.name.clone() })
            }
            StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN => {
                let message = self.message(response);
                let who = match &self.credentials {
                    Some(credentials) => format!("as {:?}", credentials.username),
                    None => "without credentials".to_owned(),
                };
                Err(self.unauthorized(format!("asked {who}: {message}")))
            }
            status => {
                let (url, status) = (url.to_owned(), status.as_u16());
                Err(Error::Registry { url, status, message: self.message(response) })
            }
        }
    }

    fn send(
        &self,
        url: &str,
        accept: &str,
        range: Option<&str>,
        authorization: Option<&str>,
    ) -> Result<Response<Body>, Error> {
        let mut request = self.agent.get(url).header(header::ACCEPT, accept);
        if let Some(range) = range {
            request = request.header(header::RANGE, range);
        }
        if let Some(authorization) = authorization {
            request = request.header(header::AUTHORIZATION, authorization);
        }
        request.call().map_err(|source| Error::Network { url: url.to_owned(), source: source.into() })
    }

    /// The `Authorization` header that meets the challenge in `headers`.
    fn authorize(&self, headers: &HeaderMap) -> Result<String, Error> {
        let challenges =
            headers.get_all(header::WWW_AUTHENTICATE).iter().filter_map(|value| value.to_str().ok());
        let challenge =
            challenges.filter_map(Challenge::parse).max_by_key(|c| matches!(c, Challenge::Bearer { .. }));
        let challenge = challenge
            .ok_or_else(|| self.unauthorized("it asks for no kind of login that is known here".to_owned()))?;
        match (challenge, &self.credentials) {
            (Challenge::Basic, Some(credentials)) => Ok(auth::basic(credentials)),
            (Challenge::Basic, None) => {
                Err(self.unauthorized("it wants a password and there is none".to_owned()))
            }
            (Challenge::Bearer { realm, service, scope }, credentials) => {
                let scope = scope.unwrap_or_else(|| format!("repository:{}:pull", self.repository));
                self.token(&realm, service.as_deref(), &scope, credentials.as_ref())
            }
        }
    }

    fn token(
        &self,
        realm: &str,
        service: Option<&str>,
        scope: &str,
        credentials: Option<&Credentials>,
    ) -> Result<String, Error> {
        if self.secure && !realm.starts_with("https://") {
            return Err(self.unauthorized(format!("it gives out tokens without encryption, at {realm:?}")));
        }
        let mut request = self.agent.get(realm).query("scope", scope);
        if let Some(service) = service {
            request = request.query("service", service);
        }
        if let Some(credentials) = credentials {
            request = request.header(header::AUTHORIZATION, auth::basic(credentials));
        }
        let response = request
            .call()
            .map_err(|source| Error::Network { url: realm.to_owned(), source: source.into() })?;
        let status = response.status();
        if status != StatusCode::OK {
            let message = self.message(response);
            return Err(self.unauthorized(format!("its token service answered {status}: {message}")));
        }
        let body = self.body(response, SMALL)?;
        let token: Token = serde_json::from_slice(&body)
            .map_err(|e| self.unauthorized(format!("its token service gave no token: {e}")))?;
        let token = if token.token.is_empty() { token.access_token } else { token.token };
        Ok(format!("Bearer {token}"))
    }

    fn unauthorized(&self, why: String) -> Error {
        Error::Unauthorized { registry: self.name.clone(), repository: self.repository.clone(), why }
    }

    /// A body that may not be longer than `limit`.
    fn body(&self, response: Response<Body>, limit: u64) -> Result<Vec<u8>, Error> {
        let mut bytes = Vec::new();
        let mut reader = response.into_body().into_reader().take(limit.saturating_add(1));
        let network = |e: std::io::Error| Error::Network { url: self.base.clone(), source: e.into() };
        reader.read_to_end(&mut bytes).map_err(network)?;
        if bytes.len() as u64 > limit {
            let what = format!("an answer of {}", self.name);
            return Err(Error::SizeMismatch { what, expected: limit, actual: bytes.len() as u64 });
        }
        Ok(bytes)
    }

    /// What a registry says with an error, short enough to show.
    fn message(&self, response: Response<Body>) -> String {
        let body = self.body(response, SMALL).unwrap_or_default();
        let text = String::from_utf8_lossy(&body);
        text.lines().next().unwrap_or_default().chars().filter(|c| !c.is_control()).take(300).collect()
    }
}

/// Whether a registry is on this machine, so that nobody else can listen to plain HTTP.
fn is_loopback(registry: &str) -> bool {
    let host = match registry.strip_prefix('[') {
        Some(rest) => rest.split(']').next().unwrap_or_default(),
        None => registry.split(':').next().unwrap_or_default(),
    };
    host == "localhost" || host.parse::<IpAddr>().is_ok_and(|address| address.is_loopback())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn plain_http_is_for_this_machine_only() {
        for local in ["localhost", "localhost:5000", "127.0.0.1:1", "127.9.9.9", "[::1]:5000"] {
            assert!(is_loopback(local), "{local}");
        }
        for remote in
            ["docker.io", "localhost.example.com", "10.0.0.1:5000", "127.0.0.1.evil.example", "[fe80::1]"]
        {
            assert!(!is_loopback(remote), "{remote}");
        }
    }
}

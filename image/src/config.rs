//! What an image says about how to run it (OCI image-spec, config.md).
use std::collections::BTreeMap;

use serde::{Deserialize, Deserializer, Serialize, de::DeserializeOwned};

use crate::Digest;

/// The part of an image's configuration that a sandbox uses. Whatever the image leaves out is empty.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct ImageConfig {
    /// Environment as name and value, in the image's order.
    pub env: Vec<(String, String)>,
    /// What always runs.
    pub entrypoint: Vec<String>,
    /// What the entry point gets if the user gives nothing.
    pub cmd: Vec<String>,
    /// `user[:group]`, by name or number; empty is root.
    pub user: String,
    /// Working directory; empty is `/`.
    pub workdir: String,
    /// Labels.
    pub labels: BTreeMap<String, String>,
    /// Ports such as `80/tcp`.
    pub exposed_ports: Vec<String>,
    /// Directories meant for data of their own.
    pub volumes: Vec<String>,
    /// The signal that asks for a stop, such as `SIGTERM`; empty if the image does not say.
    pub stop_signal: String,
    /// Operating system.
    pub os: String,
    /// Processor architecture.
    pub architecture: String,
}

/// The configuration file.
#[derive(Debug, Deserialize)]
pub(crate) struct ConfigFile {
    #[serde(default, deserialize_with = "null_is_default")]
    architecture: String,
    #[serde(default, deserialize_with = "null_is_default")]
    os: String,
    #[serde(default, deserialize_with = "null_is_default")]
    config: Settings,
    #[serde(default, deserialize_with = "null_is_default")]
    pub(crate) rootfs: RootFs,
}

#[derive(Debug, Default, Deserialize)]
pub(crate) struct RootFs {
    #[serde(default, deserialize_with = "null_is_default")]
    pub(crate) diff_ids: Vec<Digest>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
struct Settings {
    #[serde(deserialize_with = "null_is_default")]
    user: String,
    #[serde(deserialize_with = "null_is_default")]
    exposed_ports: BTreeMap<String, serde::de::IgnoredAny>,
    #[serde(deserialize_with = "null_is_default")]
    env: Vec<String>,
    #[serde(deserialize_with = "null_is_default")]
    entrypoint: Vec<String>,
    #[serde(deserialize_with = "null_is_default")]
    cmd: Vec<String>,
    #[serde(deserialize_with = "null_is_default")]
    volumes: BTreeMap<String, serde::de::IgnoredAny>,
    #[serde(deserialize_with = "null_is_default")]
    working_dir: String,
    #[serde(deserialize_with = "null_is_default")]
    labels: BTreeMap<String, String>,
    #[serde(deserialize_with = "null_is_default")]
    stop_signal: String,
}

/// Go writes an empty list or map as `null`.
fn null_is_default<'de, D: Deserializer<'de>, T: Default + DeserializeOwned>(
    deserializer: D,
) -> Result<T, D::Error> {
    Ok(Option::deserialize(deserializer)?.unwrap_or_default())
}

impl ConfigFile {
    /// What to keep of it.
    pub(crate) fn into_config(self) -> ImageConfig {
        let settings = self.config;
        let pair = |text: String| match text.split_once('=') {
            Some((name, value)) => (name.to_owned(), value.to_owned()),
            None => (text, String::new()),
        };
        ImageConfig {
            env: settings.env.into_iter().map(pair).collect(),
            entrypoint: settings.entrypoint,
            cmd: settings.cmd,
            user: settings.user,
            workdir: settings.working_dir,
            labels: settings.labels,
            exposed_ports: settings.exposed_ports.into_keys().collect(),
            volumes: settings.volumes.into_keys().collect(),
            stop_signal: settings.stop_signal,
            os: self.os,
            architecture: self.architecture,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_go_writes_is_read() {
        let json = r#"{"architecture":"amd64","os":"linux","history":[{}],
            "config":{"Env":["PATH=/bin","A=b=c","EMPTY"],"Cmd":null,"Entrypoint":["/x"],"ExposedPorts":{"80/tcp":{}},
                      "Volumes":null,"WorkingDir":"/w","Labels":{"k":"v"},"User":"1000:1000","Healthcheck":{}}}"#;
        let config = serde_json::from_str::<ConfigFile>(json).unwrap().into_config();
        let pair = |name: &str, value: &str| (name.to_owned(), value.to_owned());
        assert_eq!(config.env, [pair("PATH", "/bin"), pair("A", "b=c"), pair("EMPTY", "")]);
        assert_eq!(
            (config.cmd.len(), config.exposed_ports, config.user.as_str()),
            (0, vec!["80/tcp".to_owned()], "1000:1000")
        );
        assert_eq!(
            serde_json::from_str::<ConfigFile>(r#"{"config":null}"#).unwrap().into_config(),
            ImageConfig::default()
        );
    }
}

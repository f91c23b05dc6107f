//! A real registry (Debian's `docker-registry`) on loopback, on a free port, that ends with its owner.

use std::fs;
use std::io::{Read, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

/// One that runs.
pub struct Registry {
    process: Child,
    port: u16,
    config: PathBuf,
    log: PathBuf,
}

impl Registry {
    /// Starts one on `storage` and waits until it answers.
    pub fn start(storage: &Path) -> Result<Self> {
        // A port that was free a moment ago may be taken by then: a second and a third try.
        let mut last = None;
        for _ in 0..3 {
            match Self::try_start(storage) {
                Ok(registry) => return Ok(registry),
                Err(error) => last = Some(error),
            }
        }
        Err(last.context("no try")?)
    }

    fn try_start(storage: &Path) -> Result<Self> {
        let port = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?.local_addr()?.port();
        let config = std::env::temp_dir().join(format!("registry-{}-{port}.json", std::process::id()));
        // JSON is YAML.
        let content = serde_json::json!({
            "version": "0.1",
            "log": { "level": "error", "accesslog": { "disabled": true } },
            "storage": { "filesystem": { "rootdirectory": storage }, "delete": { "enabled": true } },
            "http": { "addr": format!("127.0.0.1:{port}") },
        });
        fs::write(&config, content.to_string())?;
        let log = config.with_extension("log");
        let process = Command::new("docker-registry")
            .arg("serve")
            .arg(&config)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            // It logs every blob that a client asked for and that it does not have yet as an error.
            .stderr(fs::File::create(&log)?)
            .spawn()
            .context("cannot run docker-registry")?;
        let mut registry = Self { process, port, config, log };
        let deadline = Instant::now() + Duration::from_secs(60);
        while !registry.answers() {
            if let Some(status) = registry.process.try_wait()? {
                bail!("docker-registry ended with {status}\n{}", fs::read_to_string(&registry.log)?);
            }
            if Instant::now() > deadline {
                bail!("docker-registry does not answer\n{}", fs::read_to_string(&registry.log)?);
            }
            sleep(Duration::from_millis(20));
        }
        Ok(registry)
    }

    /// The host part of a reference to an image in it.
    pub fn address(&self) -> String {
        format!("localhost:{}", self.port)
    }

    fn answers(&self) -> bool {
        let ask = || -> std::io::Result<bool> {
            let mut stream = TcpStream::connect((Ipv4Addr::LOCALHOST, self.port))?;
            stream.set_read_timeout(Some(Duration::from_secs(5)))?;
            stream.write_all(b"GET /v2/ HTTP/1.0\r\n\r\n")?;
            let mut answer = String::new();
            stream.read_to_string(&mut answer)?;
            Ok(answer.contains(" 200 "))
        };
        ask().unwrap_or(false)
    }
}

impl Drop for Registry {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
        for file in [&self.config, &self.log] {
            let _ = fs::remove_file(file);
        }
    }
}

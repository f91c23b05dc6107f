//! `connect`: standard input and output at a vsock port of a sandbox.

use cubbyhole::Sandbox;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use crate::failure::Failure;
use crate::output;

/// What is read at once.
const READ: usize = 64 << 10;

/// `cubby connect`: until the sandbox's side has ended.
pub async fn connect(name: &str, port: u32) -> Result<u8, Failure> {
    let stream = Sandbox::get(name).await?.connect_vsock(port).await?;
    let (mut reader, mut writer) = tokio::io::split(stream);
    // A failure to write is the end of the other side, which reading tells.
    tokio::spawn(async move {
        let _ = tokio::io::copy(&mut tokio::io::stdin(), &mut writer).await;
        let _ = writer.shutdown().await;
    });
    let mut bytes = vec![0; READ];
    loop {
        let count =
            reader.read(&mut bytes).await.map_err(|error| Failure::new(format!("{name}: {error}")))?;
        if count == 0 {
            return Ok(0);
        }
        output::print(bytes.get(..count).unwrap_or_default())?;
    }
}

//! Commands and their streams: all at once, as they come, with an input, with a terminal.
//!
//! `cargo run --example commands [IMAGE]`
use std::time::Duration;

use cubbyhole::{Error, ExecEvent, Sandbox};

#[tokio::main]
async fn main() -> Result<(), Error> {
    let image = std::env::args().nth(1).unwrap_or_else(|| "python:3.12".into());
    let name = format!("commands-{}", std::process::id());
    let sandbox = Sandbox::builder(name).image(image).ephemeral(true).create().await?;

    // ANCHOR: exec
    let output = sandbox.exec("ls", ["/no/such/file", "/etc/hostname"]).await?;
    println!("{:?}", output.status());
    println!("out: {}err: {}", output.stdout()?, output.stderr()?);
    // ANCHOR_END: exec

    // ANCHOR: options
    let output = sandbox
        .exec_with("sh", |options| {
            options
                .args(["-c", "id -un; pwd; echo $GREETING; tr a-z A-Z"])
                .env("GREETING", "hello")
                .cwd("/tmp")
                .user("nobody")
                .stdin("from the host\n")
        })
        .await?;
    print!("{}", output.stdout()?);
    // ANCHOR_END: options

    // ANCHOR: timeout
    let slow = sandbox.exec_with("sleep", |o| o.args(["600"]).timeout(Duration::from_millis(200))).await;
    if let Err(error @ Error::Timeout { .. }) = slow {
        println!("{error}");
    }
    // ANCHOR_END: timeout

    // ANCHOR: stream
    let mut command =
        sandbox.shell_stream("echo your name?; read name; echo hello $name >&2; exit 3").await?;
    while let Some(event) = command.next().await {
        match event? {
            ExecEvent::Started { .. } => println!("started"),
            ExecEvent::Stdout(bytes) => {
                print!("out: {}", String::from_utf8_lossy(&bytes));
                command.write_stdin("Ada\n").await?;
            }
            ExecEvent::Stderr(bytes) => print!("err: {}", String::from_utf8_lossy(&bytes)),
            ExecEvent::Exited(status) => println!("code {:?}, signal {:?}", status.code, status.signal),
        }
    }
    // ANCHOR_END: stream

    // ANCHOR: terminal
    let output = sandbox.exec_with("sh", |o| o.args(["-c", "tty; stty size"]).tty(24, 80)).await?;
    print!("{}", output.stdout()?);
    // ANCHOR_END: terminal

    // ANCHOR: signal
    let mut command = sandbox.exec_stream("sleep", ["600"]).await?;
    command.signal(15).await?;
    println!("{:?}", command.wait().await?);
    // ANCHOR_END: signal

    sandbox.stop().await
}

//! A command goes on without the program that has started it, is joined again, and leaves what it wrote in the log.
//!
//! `cargo run --example sessions [IMAGE]`
use cubbyhole::{Error, ExecEvent, LogOptions, Sandbox};
use tokio_stream::StreamExt;

#[tokio::main]
async fn main() -> Result<(), Error> {
    let image = std::env::args().nth(1).unwrap_or_else(|| "python:3.12".into());
    let name = format!("sessions-{}", std::process::id());
    let sandbox = Sandbox::builder(name).image(image).memory(256).ephemeral(true).create().await?;

    // ANCHOR: detach
    let handle = sandbox.shell_stream("echo 'your name?'; read name; echo \"hello $name\"; exit 3").await?;
    let session = handle.id();
    handle.detach().await?;
    // ANCHOR_END: detach

    // ANCHOR: attach
    for session in sandbox.sessions().await? {
        println!("{} detached: {}", session.command.join(" "), session.detached);
    }
    // From here on it could be another program, with `Sandbox::get`.
    let mut joined = sandbox.attach(session).await?;
    joined.write_stdin("Ada\n").await?;
    while let Some(event) = joined.next().await {
        match event? {
            ExecEvent::Stdout(bytes) => print!("{}", String::from_utf8_lossy(&bytes)),
            ExecEvent::Exited(status) => println!("{status:?}"),
            _ => {}
        }
    }
    // ANCHOR_END: attach

    // ANCHOR: logs
    let options = LogOptions { session: Some(session), follow: true, ..LogOptions::default() };
    let mut lines = sandbox.logs(options).await?.take(2);
    while let Some(line) = lines.next().await {
        println!("{:?}: {}", line.source, line.text());
    }
    // ANCHOR_END: logs
    sandbox.stop().await
}

//! A sandbox's life: paused, stopped, booted again with its disk, crashed, removed.
//!
//! `cargo run --example lifecycle [IMAGE]`
use cubbyhole::{Error, Sandbox};

#[tokio::main]
async fn main() -> Result<(), Error> {
    let image = std::env::args().nth(1).unwrap_or_else(|| "python:3.12".into());
    let name = format!("lifecycle-{}", std::process::id());

    // ANCHOR: pause
    let sandbox = Sandbox::builder(&name).image(image).memory(256).create().await?;
    sandbox.pause().await?;
    if let Err(error) = sandbox.exec("true", [""; 0]).await {
        println!("{}: {error}", sandbox.status().await?);
    }
    sandbox.resume().await?;
    // ANCHOR_END: pause

    // ANCHOR: stop
    sandbox.shell("echo kept > /root/note").await?;
    sandbox.stop().await?;
    let sandbox = Sandbox::start(&name).await?;
    print!("{}: {}", sandbox.status().await?, sandbox.shell("cat /root/note").await?.stdout()?);
    // ANCHOR_END: stop

    // ANCHOR: crash
    // Root of a guest may end its own kernel; that is on record, with the console's last words.
    let crash = sandbox.shell("echo c > /proc/sysrq-trigger").await;
    println!("the command: {}", if matches!(crash, Err(Error::Ended { .. })) { "ended" } else { "went on" });
    let report = sandbox.wait().await?;
    let console = report.console_tail.unwrap_or_default();
    let panic = console.lines().find(|line| line.contains("Kernel panic")).unwrap_or_default();
    println!("{}: {}, {panic}", sandbox.status().await?, report.reason);
    // ANCHOR_END: crash

    // ANCHOR: list
    for handle in Sandbox::list().await? {
        println!("{} is {}", handle.name().starts_with("lifecycle-"), handle.status());
    }
    Sandbox::remove(&name).await
    // ANCHOR_END: list
}

//! A policy with rules: a sandbox that may talk to one port of this computer, and to nobody else.
//!
//! `cargo run --example network [IMAGE]`

use std::io::Write;
use std::net::TcpListener;

use cubbyhole::Sandbox;
use cubbyhole::network::{NetworkPolicy, Protocol, Rule};

#[tokio::main]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let image = std::env::args().nth(1).unwrap_or_else(|| "python:3.12".into());
    let server = TcpListener::bind("127.0.0.1:0")?;
    let port = server.local_addr()?.port();
    std::thread::spawn(move || {
        for mut client in server.incoming().flatten() {
            // Who has gone already need not be greeted.
            let _ = client.write_all(b"a greeting from the host");
        }
    });

    let this_port = Rule::allow().net("127.0.0.1".parse()?).protocol(Protocol::Tcp).ports(port);
    let policy = NetworkPolicy::none().rule(this_port);
    let sandbox = Sandbox::builder("confined").image(image).network(policy).ephemeral(true).create().await?;

    for (what, port) in [("allowed", port), ("denied", port ^ 1)] {
        let program = format!(
            "import socket\n\
             try: print(socket.create_connection(('host.cubbyhole.internal', {port})).recv(100).decode())\n\
             except OSError as error: print(type(error).__name__)"
        );
        let said = sandbox.exec("python3", ["-c", &program]).await?;
        print!("{what}: {}", said.stdout()?);
    }
    sandbox.stop().await?;
    Ok(())
}

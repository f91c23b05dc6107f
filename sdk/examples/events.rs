//! A worker in the guest and the program around it tell each other things: the worker is ready, takes jobs, and reports.
//!
//! `cargo run --example events [IMAGE]`
use cubbyhole::{Error, Sandbox};
use serde_json::Value;

/// What runs in the guest. It needs nothing but a socket.
const WORKER: &str = r#"
import json, socket
agent = socket.socket(socket.AF_UNIX)
agent.connect("/run/agent.sock")
def tell(event, data):
    agent.sendall(json.dumps({"event": event, "data": data}).encode() + b"\n")
tell("ready", None)
for line in agent.makefile():
    event = json.loads(line)
    if event["event"] == "end":
        break
    tell("done", {"job": event["data"], "square": event["data"] ** 2})
"#;

const JOBS: u32 = 3;

#[tokio::main]
async fn main() -> Result<(), Error> {
    let image = std::env::args().nth(1).unwrap_or_else(|| "python:3.12".into());
    let name = format!("events-{}", std::process::id());
    let sandbox = Sandbox::builder(name).image(image).memory(256).ephemeral(true).create().await?;

    // Before the worker begins: nothing is kept for those who come later.
    let (sender, mut events) = tokio::sync::mpsc::unbounded_channel();
    let _subscription = sandbox.on_event("*", move |event| drop(sender.send(event))).await?;
    let mut worker = sandbox.exec_stream("python3", ["-c", WORKER]).await?;
    let mut done = 0;
    while done < JOBS {
        let Some(event) = events.recv().await else { break };
        match event.name.as_str() {
            "ready" => {
                for job in 1..=JOBS {
                    sandbox.emit("job", &job).await?;
                }
            }
            "done" => {
                done += 1;
                let number = |name| event.data.get(name).and_then(Value::as_u64).unwrap_or_default();
                println!("{} squared is {}", number("job"), number("square"));
            }
            other => println!("nobody expected {other:?}"),
        }
    }
    sandbox.emit("end", &()).await?;
    println!("{:?}", worker.wait().await?);
    sandbox.stop().await
}

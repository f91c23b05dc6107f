//! An agent's loop: write a program, run it where it can do no harm, read what it says, write a better one. A language
//! model would do the writing; here [`Author`] makes typing errors and heeds the interpreter's hints, which needs no
//! network.
//!
//! `cargo run --example agent_loop [IMAGE]`
use std::time::Duration;

use cubbyhole::{Error, ExecOutput, Sandbox};

/// Who writes the programs.
struct Author {
    program: String,
}

impl Author {
    /// The first try at the task.
    fn new() -> Self {
        Self { program: "import maths\nprint(sorded(maths.comb(5, k) for k in range(6)))\n".into() }
    }

    /// The next try, with what the last one said.
    fn next(&mut self, errors: &str) -> Option<()> {
        let message = errors.lines().last()?;
        let mut quoted = message.split('\'').skip(1).step_by(2);
        let (wrong, right) = match (quoted.next()?, quoted.next()) {
            (wrong, Some(hint)) => (wrong, hint),
            ("maths", None) => ("maths", "math"),
            _ => return None,
        };
        self.program = self.program.replace(wrong, right);
        Some(())
    }
}

/// Runs one try. It goes in as a file of the sandbox, and stays there for the next.
async fn attempt(sandbox: &Sandbox, program: &str) -> Result<ExecOutput, Error> {
    sandbox.fs().write("/task/task.py", program).await?;
    sandbox.exec_with("python3", |options| options.args(["task.py"]).timeout(Duration::from_secs(60))).await
}

#[tokio::main]
async fn main() -> Result<(), Error> {
    let image = std::env::args().nth(1).unwrap_or_else(|| "python:3.12".into());
    let name = format!("agent-loop-{}", std::process::id());
    let sandbox = Sandbox::builder(name)
        .image(image)
        .workdir("/task")
        .idle_timeout(300)
        .ephemeral(true)
        .create()
        .await?;
    let mut author = Author::new();
    for round in 1..=5 {
        let output = attempt(&sandbox, &author.program).await?;
        if output.success() {
            print!("round {round}: {}", output.stdout()?);
            break;
        }
        let errors = output.stderr()?;
        println!("round {round}: {}", errors.lines().last().unwrap_or_default());
        if author.next(&errors).is_none() {
            break;
        }
    }
    sandbox.stop().await
}

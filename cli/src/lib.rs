//! The `cubby` command: sandboxes for whoever knows docker and podman. A thin program on the public SDK: what it can
//! do, any program can.
//!
//! `run`, `exec`, `shell` and `attach` exit as the command in the sandbox did (128 and the signal's number for a signal); 124 is
//! its time-out, 125 a failure of our own, 126 a command that cannot be executed, 127 one that is not there. All other
//! commands exit with 0, with 1 if something of what was asked failed, and with 2 if it was not understood. Data goes
//! to standard output, all else to standard error. Colour and progress are for terminals only; `NO_COLOR` is heeded.
#![forbid(unsafe_code)]

mod amount;
mod arguments;
mod copy;
mod doctor;
mod events;
mod failure;
mod images;
mod keys;
mod lifecycle;
mod list;
mod manual;
mod name;
mod network;
mod output;
mod progress;
mod prune;
mod run;
mod session;
mod sessions;
mod stats;
mod table;
mod terminal;
mod time;
mod vsock;

use std::ffi::OsString;
use std::process::ExitCode;

use clap::{CommandFactory, Parser};

use arguments::{Arguments, Command, List};
use failure::Failure;

/// The whole program.
pub fn main() -> ExitCode {
    let words: Vec<OsString> = std::env::args_os().collect();
    let arguments = match Arguments::try_parse_from(&words) {
        Ok(arguments) => arguments,
        Err(error) => {
            // Help that was asked for comes here as well. Nobody may be there to read it.
            let _ = error.print();
            return if error.use_stderr() { misunderstood(&words).into() } else { ExitCode::SUCCESS };
        }
    };
    let runtime = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => return Failure::own(format!("cannot begin: {error}")).report().into(),
    };
    let code = runtime.block_on(dispatch(arguments.command)).unwrap_or_else(|failure| failure.report());
    // A thread that reads the terminal comes back when somebody types, and not before.
    runtime.shutdown_background();
    code.into()
}

async fn dispatch(command: Command) -> Result<u8, Failure> {
    match command {
        Command::Run(run) => run::run(run).await,
        Command::Create(create) => run::create(create).await,
        Command::Exec(exec) => run::exec(exec).await,
        Command::Cp(cp) => copy::copy(cp).await,
        Command::Shell { name } => run::shell(name).await,
        Command::Start { names } => lifecycle::each(names, lifecycle::Operation::Start).await,
        Command::Stop { names, timeout } => {
            lifecycle::each(names, lifecycle::Operation::Stop { timeout }).await
        }
        Command::Kill { names } => lifecycle::each(names, lifecycle::Operation::Kill).await,
        Command::Pause { names } => lifecycle::each(names, lifecycle::Operation::Pause).await,
        Command::Resume { names } => lifecycle::each(names, lifecycle::Operation::Resume).await,
        Command::Drain { names, deadline } => {
            lifecycle::each(names, lifecycle::Operation::Drain { deadline }).await
        }
        Command::Rm { names, force } => lifecycle::each(names, lifecycle::Operation::Remove { force }).await,
        Command::Ps(list) => list::list(list).await,
        Command::Ls(list) => list::list(List { all: true, ..list }).await,
        Command::Sessions { name, json } => sessions::list(&name, json).await,
        Command::Attach(attach) => sessions::attach(attach).await,
        Command::Logs(logs) => sessions::logs(logs).await,
        Command::Inspect { names, .. } => list::inspect(names).await,
        Command::Events { name, event, .. } => events::events(&name, event.as_deref()).await,
        Command::Emit { name, event, data } => events::emit(&name, &event, &data).await,
        Command::Network { what } => network::network(what).await,
        Command::Connect { name, port } => vsock::connect(&name, port).await,
        Command::Stats { names, no_stream, json, openmetrics } => {
            let form = match (json, openmetrics) {
                (true, _) => stats::Form::Json,
                (_, true) => stats::Form::OpenMetrics,
                _ => stats::Form::Table { once: no_stream },
            };
            stats::stats(names, form).await
        }
        Command::Doctor { json } => doctor::doctor(json).await,
        Command::Pull(pull) => images::pull(pull).await,
        Command::Images(images) => images::list(images).await,
        Command::Rmi { images } => images::remove(images).await,
        Command::Prune(prune) => prune::prune(prune).await,
        Command::Man { directory } => manual::write(&directory),
        Command::Completion { shell } => {
            let mut script = Vec::new();
            clap_complete::generate(shell, &mut Arguments::command(), "cubby", &mut script);
            output::print(&script)
        }
    }
}

/// The exit code of a command line that makes no sense. One that would have exited as another command does must not
/// look as if that had.
fn misunderstood(words: &[OsString]) -> u8 {
    let runs =
        words.get(1).is_some_and(|word| ["run", "exec", "shell", "attach"].iter().any(|runs| word == runs));
    if runs { failure::OWN } else { 2 }
}

//! `run`, `create`, `exec` and `shell`: commands in sandboxes, new ones and those that are there.

use std::io::IsTerminal;

use cubbyhole::{Error, ImageDefaults, PullPolicy, Sandbox, SandboxBuilder, Status};
use tokio_stream::{Stream, StreamExt};

use crate::arguments::{CommandOptions, Create, Exec, Pull, Run, Settings, StreamOptions};
use crate::failure::{Failure, complain, explain, say};
use crate::keys::DetachKeys;
use crate::output;
use crate::progress::ProgressLine;
use crate::session::{self, Ended, Job};

/// `cubby run`: a new sandbox for one command.
pub async fn run(run: Run) -> Result<u8, Failure> {
    session::check(run.streams)?;
    let mut words = run.words.into_iter();
    let image = words.next().unwrap_or_default();
    let arguments: Vec<String> = words.collect();
    if run.detach && (!arguments.is_empty() || run.entrypoint.is_some()) {
        return Err(Failure::own("run -d starts no command: leave it away, and start it with cubby exec -d"));
    }
    let (env, env_file) = (run.settings.command.env.clone(), run.settings.command.env_file.clone());
    let made = make(run.settings, &image, run.rm).await;
    let sandbox = made.map_err(|error| Failure::of_command(&error))?;
    if run.detach {
        return detach(sandbox).await.map_err(|error| Failure::of_command(&error));
    }
    let ended = async {
        let inspected = sandbox.inspect().await.map_err(|error| Failure::of_command(&error))?;
        let words = command(&inspected.config.image.defaults, run.entrypoint, arguments);
        if words.is_empty() {
            return Err(Failure::own(format!("image {image} names no command: give one after it")));
        }
        // The sandbox has the options already, for this command and for later ones; but TERM, if it is one of the
        // variables, goes over ours.
        let options = CommandOptions { env, env_file, ..CommandOptions::default() };
        session::run(&sandbox, Job { words, options, timeout: run.timeout, streams: run.streams }).await
    };
    let ended = ended.await;
    let put_away = match ended {
        // The sandbox goes on with its command.
        Ok(Ended::Detached(_)) => sandbox.clone().detach().await,
        _ => put_away(&sandbox, &ended).await,
    };
    match put_away {
        Ok(()) => {}
        // What the command did is the answer nevertheless.
        Err(error) => complain(&explain(&error)),
    }
    Ok(code(sandbox.name(), ended?))
}

/// Stops the sandbox of a `run`. One that has ended meanwhile is where it should be.
async fn put_away(sandbox: &Sandbox, ended: &Result<Ended, Failure>) -> Result<(), Error> {
    let stopped = async {
        match ended {
            Ok(Ended::Abandoned(_)) => sandbox.kill().await,
            _ => sandbox.stop().await,
        }
    };
    // Who does not want to wait for that either need not.
    let stopped = tokio::select! {
        stopped = stopped => stopped,
        _ = tokio::signal::ctrl_c() => sandbox.kill().await,
    };
    match stopped {
        Err(Error::NotFound { .. }) => Ok(()),
        Err(Error::InvalidState { .. }) if !matches!(sandbox.status().await, Ok(status) if status.is_live()) => {
            Ok(())
        }
        result => result,
    }
}

/// `cubby create`: a sandbox that goes on by itself.
pub async fn create(create: Create) -> Result<u8, Failure> {
    let sandbox = make(create.settings, &create.image, create.rm).await?;
    Ok(detach(sandbox).await?)
}

async fn detach(sandbox: Sandbox) -> Result<u8, Error> {
    let name = sandbox.name().to_owned();
    sandbox.detach().await?;
    // It is there whether or not anybody reads its name.
    let _ = output::print(format!("{name}\n").as_bytes());
    Ok(0)
}

/// `cubby exec`: a command in a sandbox that runs.
pub async fn exec(exec: Exec) -> Result<u8, Failure> {
    let mut words = exec.words.into_iter();
    let name = words.next().unwrap_or_default();
    let sandbox = Sandbox::get(&name).await.map_err(|error| Failure::of_command(&error))?;
    let job = Job { words: words.collect(), options: exec.own, timeout: exec.timeout, streams: exec.streams };
    if exec.detach {
        let session = session::start_detached(&sandbox, job).await?;
        return output::print(format!("{session}\n").as_bytes());
    }
    Ok(code(&name, session::run(&sandbox, job).await?))
}

/// `cubby shell`: the sandbox's shell, on a terminal if there is one, else with a script as its input.
pub async fn shell(name: Option<String>) -> Result<u8, Failure> {
    let failed = |error: Error| Failure::of_command(&error);
    let name = match name {
        Some(name) => name,
        None => the_only_one().await?,
    };
    let sandbox = Sandbox::get(&name).await.map_err(failed)?;
    let shell = sandbox.inspect().await.map_err(failed)?.config.shell;
    let tty = std::io::stdin().is_terminal() && std::io::stdout().is_terminal();
    let job = Job {
        words: vec![shell.unwrap_or_else(|| "/bin/sh".into())],
        options: CommandOptions::default(),
        timeout: None,
        streams: StreamOptions { interactive: true, tty, detach_keys: DetachKeys::default() },
    };
    Ok(code(&name, session::run(&sandbox, job).await?))
}

/// The exit code of what has ended. Of what goes on it is said where to find it.
fn code(name: &str, ended: Ended) -> u8 {
    match ended {
        Ended::Exited(code) | Ended::Abandoned(code) => code,
        Ended::Detached(session) => {
            say(&format!("session {session} goes on: cubby attach {name} {session}"));
            0
        }
    }
}

/// The sandbox that runs, if it is one.
async fn the_only_one() -> Result<String, Failure> {
    let list = Sandbox::list().await.map_err(|error| Failure::of_command(&error))?;
    let running: Vec<&str> =
        list.iter().filter(|one| one.status() == Status::Running).map(|one| one.name()).collect();
    match running[..] {
        [name] => Ok(name.to_owned()),
        [] => Err(Failure::own("no sandbox runs: make one with cubby create IMAGE")),
        _ => Err(Failure::own(format!("{} run: say which, cubby shell NAME", running.join(", ")))),
    }
}

/// What `words` and the image's own configuration make of a command, as docker does: arguments replace the image's CMD,
/// and an entry point of one's own both.
fn command(image: &ImageDefaults, entrypoint: Option<String>, arguments: Vec<String>) -> Vec<String> {
    match entrypoint {
        Some(program) => std::iter::once(program).chain(arguments).collect(),
        None if arguments.is_empty() => [&image.entrypoint[..], &image.cmd].concat(),
        None => [&image.entrypoint[..], &arguments].concat(),
    }
}

fn builder(name: &str, settings: Settings, image: &str) -> SandboxBuilder {
    let mut builder = Sandbox::builder(name).image(image).pull_policy(match settings.pull {
        Pull::Missing => PullPolicy::IfMissing,
        Pull::Always => PullPolicy::Always,
        Pull::Never => PullPolicy::Never,
    });
    for (name, value) in settings.command.variables() {
        builder = builder.env(name, value);
    }
    for (name, value) in settings.label {
        builder = builder.label(name, value);
    }
    builder = settings.publish.into_iter().fold(builder, SandboxBuilder::publish);
    builder = settings.dns.into_iter().fold(builder, SandboxBuilder::resolver);
    builder = set(builder, settings.network, SandboxBuilder::network);
    builder = set(builder, settings.bandwidth, SandboxBuilder::bandwidth);
    builder = set(builder, settings.pcap, SandboxBuilder::capture);
    for vsock in settings.vsock {
        builder = builder.vsock_listen(vsock.port, vsock.path);
    }
    builder = set(builder, settings.command.workdir, SandboxBuilder::workdir);
    builder = set(builder, settings.command.user, SandboxBuilder::user);
    builder = set(builder, settings.hostname, SandboxBuilder::hostname);
    builder = set(builder, settings.cpus, SandboxBuilder::cpus);
    builder = set(builder, settings.memory, SandboxBuilder::memory);
    builder = set(builder, settings.disk, SandboxBuilder::disk);
    builder = set(builder, settings.max_duration, SandboxBuilder::max_duration);
    set(builder, settings.idle_timeout, SandboxBuilder::idle_timeout)
}

/// What was not said stays as it is.
fn set<T>(
    builder: SandboxBuilder,
    value: Option<T>,
    setter: impl FnOnce(SandboxBuilder, T) -> SandboxBuilder,
) -> SandboxBuilder {
    match value {
        Some(value) => setter(builder, value),
        None => builder,
    }
}

/// Creates a sandbox and shows how far that is. One that did not boot stays for `inspect`, unless nobody has named it.
async fn make(mut settings: Settings, image: &str, ephemeral: bool) -> Result<Sandbox, Error> {
    let named = settings.name.take();
    let name = named.clone().unwrap_or_else(crate::name::generate);
    let mut line = ProgressLine::new(image, settings.quiet, false);
    let builder = builder(&name, settings, image).ephemeral(ephemeral);
    let (progress, create) = builder.create_with_progress();
    let (sandbox, ()) = tokio::join!(create, watch(progress, &mut line));
    if let Err(error) = &sandbox
        && named.is_none()
        && !matches!(error, Error::AlreadyExists { .. })
    {
        // It may not have come so far as to be there.
        let _ = Sandbox::remove(&name).await;
    }
    sandbox
}

async fn watch(mut progress: impl Stream<Item = cubbyhole::Progress> + Unpin, line: &mut ProgressLine) {
    while let Some(step) = progress.next().await {
        line.show(&step);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_command_is_put_together_as_docker_does() {
        let words = |words: &[&str]| words.iter().map(|&word| word.to_owned()).collect::<Vec<_>>();
        let image = ImageDefaults {
            entrypoint: words(&["/entry", "-x"]),
            cmd: words(&["serve"]),
            ..ImageDefaults::default()
        };
        for (entrypoint, arguments, expected) in [
            (None, &[][..], &["/entry", "-x", "serve"][..]),
            (None, &["a", "b"], &["/entry", "-x", "a", "b"]),
            (Some("sh"), &[], &["sh"]),
            (Some("sh"), &["-c", "x"], &["sh", "-c", "x"]),
        ] {
            let made = command(&image, entrypoint.map(str::to_owned), words(arguments));
            assert_eq!(made, expected);
        }
        assert!(command(&ImageDefaults::default(), None, Vec::new()).is_empty());
    }
}

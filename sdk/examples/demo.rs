//! One real job through all of it: pull an image, create a sandbox, run Python in it, write a file, read it
//! back, stop. Shows the time of each step. `cargo xtask demo` prepares everything that it needs.
//!
//! `demo --image REFERENCE [-- COMMAND…]`
use std::process::ExitCode;
use std::time::{Duration, Instant};

use cubbyhole::{ExitStatus, ImageProgress, Progress, Sandbox};
use tokio_stream::StreamExt;

fn step(what: &str, time: Duration) {
    println!("  {:>9.1} ms  {what}", time.as_secs_f64() * 1e3);
}

fn show(progress: &Progress) {
    match progress {
        Progress::Image(ImageProgress::Downloading { digest, bytes, total }) if bytes == total => {
            println!("  downloaded {digest} ({:.1} MB)", *total as f64 / 1e6);
        }
        Progress::Ready(phases) => {
            for phase in phases {
                println!("  {:>9.1} ms    {}", phase.duration.as_secs_f64() * 1e3, phase.name);
            }
        }
        _ => {}
    }
}

/// A command's status as a shell reports it: 128 and the signal's number for a signal.
fn shell_code(status: ExitStatus) -> u8 {
    let code = status.code.or(status.signal.map(|signal| 128 + signal)).unwrap_or(255);
    u8::try_from(code).unwrap_or(255)
}

async fn run(image: String, command: Vec<String>) -> Result<u8, Box<dyn std::error::Error>> {
    let name = format!("demo-{}", std::process::id());
    println!("image {image}, sandbox {name}");
    let begin = Instant::now();
    let (mut progress, create) = Sandbox::builder(&name).image(image).create_with_progress();
    let listen = async {
        while let Some(event) = progress.next().await {
            show(&event);
        }
    };
    let (created, ()) = tokio::join!(create, listen);
    let sandbox = created?;
    step("create, to ready", begin.elapsed());

    let outcome = job(&sandbox, command).await;
    let begin = Instant::now();
    sandbox.stop().await?;
    step("stop", begin.elapsed());
    Sandbox::remove(&name).await?;
    outcome
}

async fn job(sandbox: &Sandbox, command: Vec<String>) -> Result<u8, Box<dyn std::error::Error>> {
    if let Some((program, arguments)) = command.split_first() {
        let begin = Instant::now();
        let output = sandbox.exec(program, arguments.to_vec()).await?;
        print!("{}", String::from_utf8_lossy(output.stdout_bytes()));
        eprint!("{}", String::from_utf8_lossy(output.stderr_bytes()));
        step(program, begin.elapsed());
        return Ok(shell_code(output.status()));
    }
    let steps: [(&str, &[&str], &str); 3] = [
        ("true", &[], ""),
        ("python3", &["--version"], "Python 3."),
        ("python3", &["-c", "print(sum(n * n for n in range(1000)))"], "332833500"),
    ];
    for (program, arguments, expected) in steps {
        let begin = Instant::now();
        let output = sandbox.exec(program, arguments.iter().copied()).await?;
        step(&format!("{program} {}", arguments.join(" ")), begin.elapsed());
        print!("{}", output.stdout()?);
        if !output.success() || !output.stdout()?.contains(expected) {
            return Err(format!("{program}: {:?}, {}", output.status(), output.stderr()?).into());
        }
    }
    let write = "open('/root/note', 'w').write('kept by the sandbox\\n')";
    let begin = Instant::now();
    sandbox.exec("python3", ["-c", write]).await?;
    step("python3 writes a file", begin.elapsed());
    let begin = Instant::now();
    let note = sandbox.shell("cat /root/note; uname -sr; id -un").await?;
    step("shell reads it back", begin.elapsed());
    print!("{}", note.stdout()?);
    if !note.stdout()?.starts_with("kept by the sandbox\n") {
        return Err("the file was not read back".into());
    }
    Ok(0)
}

fn main() -> Result<ExitCode, Box<dyn std::error::Error>> {
    let mut arguments = std::env::args().skip(1);
    let mut image = None;
    let mut command = Vec::new();
    while let Some(argument) = arguments.next() {
        match argument.as_str() {
            "--image" => image = arguments.next(),
            "--" => command.extend(arguments.by_ref()),
            other => {
                return Err(format!("unknown argument {other}: demo --image REFERENCE [-- COMMAND…]").into());
            }
        }
    }
    let image = image.ok_or("demo --image REFERENCE [-- COMMAND…]")?;
    // One thread is enough for a program that does one thing at a time.
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    match runtime.block_on(run(image, command)) {
        Ok(code) => Ok(ExitCode::from(code)),
        Err(error) => {
            eprintln!("demo: {error}");
            Ok(ExitCode::FAILURE)
        }
    }
}

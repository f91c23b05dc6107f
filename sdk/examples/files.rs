//! A sandbox's files from outside: written, read, listed, copied in and out.
//!
//! `cargo run --example files [IMAGE]`
use cubbyhole::{Error, Sandbox};

#[tokio::main]
async fn main() -> Result<(), Error> {
    let image = std::env::args().nth(1).unwrap_or_else(|| "python:3.12".into());
    let name = format!("files-{}", std::process::id());
    let sandbox = Sandbox::builder(name).image(image).memory(256).ephemeral(true).create().await?;

    // ANCHOR: whole
    let fs = sandbox.fs();
    fs.mkdir("/work/in").await?;
    fs.write("/work/in/numbers", "3\n1\n2\n").await?;
    sandbox.shell("sort -n /work/in/numbers > /work/sorted").await?;
    print!("{}", fs.read_to_string("/work/sorted").await?);
    // ANCHOR_END: whole

    // ANCHOR: look
    let mut entries = fs.list("/work").await?;
    entries.sort_by_key(|entry| entry.name().to_owned());
    for entry in entries {
        let what = entry.metadata();
        println!(
            "{} {:o} {} bytes",
            entry.path().display(),
            what.mode,
            if what.is_dir() { 0 } else { what.size }
        );
    }
    if let Err(error @ Error::Fs { .. }) = fs.read("/work/none").await {
        println!("{error}");
    }
    // ANCHOR_END: look

    // ANCHOR: stream
    let mut file = fs.write_stream("/work/large").await?;
    for _ in 0..8 {
        file.write(vec![7; 1 << 20]).await?;
    }
    file.finish().await?;
    let (mut file, mut bytes) = (fs.read_stream("/work/large").await?, 0);
    while let Some(chunk) = file.next().await {
        bytes += chunk?.len();
    }
    println!("{bytes} bytes");
    // ANCHOR_END: stream

    // ANCHOR: copy
    let host = std::env::temp_dir().join(format!("cubby-files-{}", std::process::id()));
    let out = fs.copy_out("/work", &host).await?;
    println!("out: {} files, {} directories", out.files, out.directories);
    let back = fs.copy_in(&host, "/again").await?;
    println!("in: {} files, {} bytes", back.files, back.bytes);
    // ANCHOR_END: copy
    std::fs::remove_dir_all(&host).map_err(|source| Error::File { path: host, source })?;
    sandbox.stop().await
}

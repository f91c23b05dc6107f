//! Pulls an image into a store and says where its disk is: `pull STORE REFERENCE`.
use std::time::Instant;

use cubby_image::{Progress, PullOptions, PullPolicy, Reference, Store};

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut arguments = std::env::args().skip(1);
    let (Some(store), Some(reference)) = (arguments.next(), arguments.next()) else {
        return Err("usage: pull STORE REFERENCE".into());
    };
    let reference: Reference = reference.parse()?;
    let store = Store::open(store)?;
    let start = Instant::now();
    let options = PullOptions::default().on_progress(move |progress| match progress {
        Progress::Downloading { bytes, total, .. } if bytes < total => {}
        progress => eprintln!("{:>8.1} ms  {progress:?}", start.elapsed().as_secs_f64() * 1e3),
    });
    let image = store.resolve(&reference, PullPolicy::IfMissing, &options).await?;
    println!("{} {} {} bytes", image.digest, image.disk.display(), image.size);
    let start = Instant::now();
    store.find(&reference)?;
    println!("found again in {} µs", start.elapsed().as_micros());
    Ok(())
}

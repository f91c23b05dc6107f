//! `pull`, `images` and `rmi`: what sandboxes are made from.

use std::time::SystemTime;

use cubbyhole::{Error, Image, Progress};
use serde_json::{Value, json};
use tokio_stream::StreamExt;

use crate::amount::bytes;
use crate::arguments::{Images, PullImage};
use crate::failure::{Failure, complain, explain};
use crate::output;
use crate::progress::ProgressLine;
use crate::table::{self, Cell};
use crate::terminal;
use crate::time::{ago, rfc3339};

/// `cubby pull`: on standard output, as docker has it, the reference that stands for the image.
pub async fn pull(pull: PullImage) -> Result<u8, Failure> {
    let mut line = ProgressLine::new(&pull.image, pull.quiet, true);
    let (mut progress, pulling) = Image::pull_with_progress(&pull.image);
    let watch = async {
        while let Some(step) = progress.next().await {
            line.show(&Progress::Image(step));
        }
    };
    let (image, ()) = tokio::join!(pulling, watch);
    drop(line);
    let image = image?;
    if pull.json {
        return output::print_json(&value(&image));
    }
    output::print(format!("{}\n", pull.image).as_bytes())
}

/// `cubby images`
pub async fn list(images: Images) -> Result<u8, Failure> {
    let found = Image::list().await?;
    if images.quiet {
        let digests: String = found.iter().map(|image| format!("{}\n", image.digest())).collect();
        return output::print(digests.as_bytes());
    }
    if images.json {
        return output::print_json(&found.iter().map(value).collect());
    }
    let now = SystemTime::now();
    let rows: Vec<[Cell; 5]> = found.iter().flat_map(|image| rows(image, now)).collect();
    let header = ["IMAGE", "DIGEST", "SIZE", "PULLED", "USED BY"];
    let text = table::render(header, &rows, terminal::width_of_stdout(), output::colour_on_stdout());
    output::print(text.as_bytes())
}

/// `cubby rmi`: each with its own success or failure.
pub async fn remove(names: Vec<String>) -> Result<u8, Failure> {
    let mut code = 0;
    for name in names {
        match Image::remove(&name).await {
            Ok(_) => drop(output::print(format!("{name}\n").as_bytes())?),
            Err(error) => {
                complain(&explain(&error));
                code = 1;
            }
        }
    }
    Ok(code)
}

/// What names an image for people: its references, or the digest of one that has none.
pub fn names(image: &Image) -> Vec<String> {
    if image.references().is_empty() {
        return vec![short(&image.digest())];
    }
    image.references().iter().map(|reference| familiar(reference).to_owned()).collect()
}

/// A reference as people write it: what docker.io has goes without saying so.
pub fn familiar(reference: &str) -> &str {
    let reference = reference.strip_prefix("docker.io/").unwrap_or(reference);
    reference.strip_prefix("library/").unwrap_or(reference)
}

/// Whether two references mean the same image, whatever was left away. A tag that was not said is any.
pub fn same_image(reference: &str, wanted: &str) -> bool {
    let rest = familiar(reference).strip_prefix(familiar(wanted));
    rest.is_some_and(|rest| rest.is_empty() || rest.starts_with([':', '@']))
}

/// The first digits of a digest, as many as [`Image::get`] wants.
fn short(digest: &str) -> String {
    digest.rsplit(':').next().unwrap_or(digest).chars().take(12).collect()
}

/// A row for each reference, as docker has it.
fn rows(image: &Image, now: SystemTime) -> Vec<[Cell; 5]> {
    let row = |reference: &str| {
        [
            Cell::from(reference),
            Cell::from(short(&image.digest())),
            Cell::from(bytes(image.size_on_disk())),
            Cell::from(ago(now.duration_since(image.pulled_at()).unwrap_or_default())),
            Cell::from(image.used_by().join(", ")),
        ]
    };
    match image.references() {
        [] => vec![row("<none>")],
        references => references.iter().map(|reference| row(familiar(reference))).collect(),
    }
}

/// All that is known of an image.
pub fn value(image: &Image) -> Value {
    json!({
        "references": image.references(),
        "digest": image.digest(),
        "size_on_disk": image.size_on_disk(),
        "pulled_at": rfc3339(image.pulled_at()),
        "used_by": image.used_by(),
    })
}

/// An image that is not there, in the words of this program.
pub fn explained(error: &Error) -> Option<String> {
    match error {
        Error::ImageNotFound { image } => {
            Some(format!("no image here is {image:?}, or several are: cubby images shows those there are"))
        }
        Error::ImageInUse { image, sandboxes } => {
            let names = sandboxes.join(" ");
            Some(format!("image {image:?} is used by {names}: remove them first, with cubby rm -f {names}"))
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_goes_without_saying_is_left_away() {
        assert_eq!(familiar("docker.io/library/python:3.12"), "python:3.12");
        assert_eq!(familiar("docker.io/someone/thing:1"), "someone/thing:1");
        assert_eq!(familiar("localhost:5000/py:latest"), "localhost:5000/py:latest");
        assert_eq!(familiar("oci:/a/b"), "oci:/a/b");
        assert_eq!(short("sha256:0123456789abcdef"), "0123456789ab");
    }

    #[test]
    fn an_image_is_found_by_what_people_write() {
        for (reference, wanted, same) in [
            ("python:3.12", "docker.io/library/python:3.12", true),
            ("docker.io/library/python:3.12", "python", true),
            ("python:3.12", "python:3.1", false),
            ("pythonic", "python", false),
            ("oci:/a/b", "oci:/a/b", true),
        ] {
            assert_eq!(same_image(reference, wanted), same, "{reference} {wanted}");
        }
    }
}

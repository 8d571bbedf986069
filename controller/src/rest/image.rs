//! Images, their boot files, and templates.

use std::path::{Path, PathBuf};

use axum::{body::Body, extract::State, http::StatusCode, response::IntoResponse};
use futures_util::StreamExt;
use muster_api::{
    Blob, ChangeTemplate, Command, CommitImage, CreateTemplate, Estimate, EstimateRequest, Image, ImportByPath,
    ImportQuery, Job, ListQuery, Page, Problem, PullImage, Template,
};
use muster_common::{ByteLen, ErrorCode};
use tokio::io::{AsyncSeekExt, AsyncWriteExt};

use super::{
    Caller, Shared,
    extract::{Answer, IfMatch, Name, Params, Post, json, nothing, versioned},
};
use crate::{
    commit,
    core::paginate,
    import::{self, BootFile, Import},
    refusal::Refusal,
};

/// Kernels and initial ramdisks; they pass through memory.
const BLOB_LIMIT: u64 = 512 << 20;

/// Images, by name and revision.
#[utoipa::path(get, path = "/v1/images", tag = "images", params(ListQuery), responses((status = 200, body = Page<Image>), (status = "default", body = Problem)))]
pub async fn list(State(shared): State<Shared>, Params(query): Params<ListQuery>) -> Answer {
    let images = shared.core.call(|core| Ok(core.all_images())).await?;
    json(paginate(images, |i| format!("{} {:010}", i.name, i.revision), query.cursor.as_deref(), query.limit)?)
}

/// One image: digest, name (its newest revision) or name@revision.
#[utoipa::path(get, path = "/v1/images/{image}", tag = "images", params(("image" = String, Path)), responses((status = 200, body = Image), (status = "default", body = Problem)))]
pub async fn get(State(shared): State<Shared>, Name(name): Name) -> Answer {
    let image = shared.core.call(move |core| Ok(core.image_view(core.image(&name)?))).await?;
    let version = image.version;
    versioned(image, version)
}

/// Deletes an image that nothing uses.
#[utoipa::path(delete, path = "/v1/images/{image}", tag = "images", params(("image" = String, Path)), responses((status = 204), (status = "default", body = Problem)))]
pub async fn delete(State(shared): State<Shared>, Name(name): Name) -> Answer {
    let image = shared.core.call(move |core| core.delete_image(&name)).await?;
    let (repository, core, imports) = (shared.repository.clone(), shared.core.clone(), shared.imports.clone());
    shared.tasks.spawn(async move {
        // an import of the same content may have stored its bytes and not yet recorded them: not in between
        let Ok(_one) = imports.acquire().await else { return };
        import::forget_unknown(repository, &core, image.digest).await;
    });
    nothing()
}

/// Reads an image back from the repository and checks every chunk. Answers with a job.
#[utoipa::path(post, path = "/v1/images/{image}/verify", tag = "images", params(("image" = String, Path)), responses((status = 202, body = Job), (status = "default", body = Problem)))]
pub async fn verify(State(shared): State<Shared>, Name(name): Name) -> Answer {
    let image = shared.core.call(move |core| Ok(core.image(&name)?.clone())).await?;
    let (job, work) = shared.jobs.begin("image-verify", &image.full_name());
    shared.tasks.spawn(import::verify(image, shared.repository.clone(), work));
    Ok((StatusCode::ACCEPTED, axum::Json(job)).into_response())
}

/// Makes the system disk of a VM, as it is now, an image. Answers with a job. The VM goes on.
#[utoipa::path(post, path = "/v1/images/commit", tag = "images", request_body = CommitImage, responses((status = 202, body = Job), (status = "default", body = Problem)))]
pub async fn commit(State(shared): State<Shared>, post: Post<CommitImage>) -> Answer {
    let (commit, issuer) = (post.value, post.caller.issuer());
    let asked = commit.clone();
    shared.core.call(move |core| core.can_commit(&asked).map(drop)).await?;
    let (job, work) = shared.jobs.begin("image-commit", &commit.name);
    let tools = commit::Tools {
        core: shared.core.clone(),
        repository: shared.repository.clone(),
        agents: shared.agents.clone(),
        now_us: shared.clock.now_us(),
    };
    let imports = shared.imports.clone();
    shared.tasks.spawn(async move {
        work.progress("waiting", 0, 0);
        // closed only when the controller ends
        let Ok(_one) = imports.acquire().await else { return };
        commit::run(commit, issuer, tools, work).await;
    });
    Ok((StatusCode::ACCEPTED, axum::Json(job)).into_response())
}

/// Imports the bytes of the body. Answers with a job when all bytes are here.
#[utoipa::path(post, path = "/v1/images", tag = "images", params(ImportQuery), request_body(content = Vec<u8>, content_type = "application/octet-stream"), responses((status = 202, body = Job), (status = "default", body = Problem)))]
pub async fn import(State(shared): State<Shared>, Params(query): Params<ImportQuery>, body: Body) -> Answer {
    let (name, new_revision) = (query.name.clone(), query.new_revision);
    // before the bytes are sent: a name that is taken costs nobody an upload
    shared.core.call(move |core| core.free_revision(&name, new_revision)).await?;
    let incoming = shared.config.state_dir.join("incoming");
    let path = incoming.join(uuid::Uuid::new_v4().simple().to_string());
    let mut upload = Upload(Some(path.clone()));
    receive(&path, body, shared.config.images.upload_limit).await?;
    upload.0 = None;
    begin(
        &shared,
        Import {
            name: query.name,
            format: query.format,
            new_revision: query.new_revision,
            source: path,
            remove_source: true,
            kernel: query.kernel.map(BootFile::Blob),
            initrd: query.initrd.map(BootFile::Blob),
            cmdline: query.cmdline.unwrap_or_default(),
            now_us: shared.clock.now_us(),
        },
    )
}

/// Removes what was received when the upload does not come to its end, also when the client goes away.
struct Upload(Option<PathBuf>);
impl Drop for Upload {
    fn drop(&mut self) {
        if let Some(path) = self.0.take() {
            // not there when it could not be created
            let _ = std::fs::remove_file(path);
        }
    }
}

fn begin(shared: &Shared, import: Import) -> Answer {
    let (job, work) = shared.jobs.begin("image-import", &import.name);
    let (repository, core, imports) = (shared.repository.clone(), shared.core.clone(), shared.imports.clone());
    shared.tasks.spawn(async move {
        work.progress("waiting", 0, 0);
        // closed only when the controller ends
        let Ok(_one) = imports.acquire().await else { return };
        import::run(import, repository, core, work).await;
    });
    Ok((StatusCode::ACCEPTED, axum::Json(job)).into_response())
}

/// Writes a body to a file; stretches of zeros become holes.
async fn receive(path: &Path, body: Body, limit: ByteLen) -> Result<(), Refusal> {
    let failed = |error: std::io::Error| {
        let code = if error.kind() == std::io::ErrorKind::StorageFull { ErrorCode::NoSpace } else { ErrorCode::Io };
        Refusal::new(code, format!("store the upload: {error}"))
    };
    let mut file = tokio::fs::File::create(path).await.map_err(failed)?;
    let mut stream = body.into_data_stream();
    let mut len = 0u64;
    while let Some(chunk) = stream.next().await {
        let chunk =
            chunk.map_err(|error| Refusal::invalid(format!("the upload broke off after {len} bytes: {error}")))?;
        len += chunk.len() as u64;
        if len > limit.0 {
            return Err(Refusal::invalid(format!("the upload is larger than {limit} (images.upload_limit)")));
        }
        if muster_repository::is_zero(&chunk) {
            file.seek(std::io::SeekFrom::Current(chunk.len() as i64)).await.map_err(failed)?;
        } else {
            file.write_all(&chunk).await.map_err(failed)?;
        }
    }
    file.flush().await.map_err(failed)?;
    file.set_len(len).await.map_err(failed)
}

/// Only who could read the file himself may have it read.
fn local_file(caller: &Caller, path: &str) -> Result<PathBuf, Refusal> {
    if !caller.is_trusted() {
        let detail = "files of the controller's machine are read only for root and its own user, over the unix socket";
        return Err(Refusal::new(ErrorCode::PermissionDenied, detail));
    }
    let path = PathBuf::from(path);
    if !path.is_absolute() {
        return Err(Refusal::invalid(format!("{} is not an absolute path", path.display())));
    }
    Ok(path)
}

/// Imports a file that the controller reads itself. Unix socket only.
#[utoipa::path(post, path = "/v1/images/import", tag = "images", request_body = ImportByPath, responses((status = 202, body = Job), (status = "default", body = Problem)))]
pub async fn import_by_path(State(shared): State<Shared>, post: Post<ImportByPath>) -> Answer {
    let (import, caller) = (post.value, post.caller);
    let source = local_file(&caller, &import.path)?;
    let boot = |path: Option<String>| path.map(|p| local_file(&caller, &p).map(BootFile::Path)).transpose();
    let (kernel, initrd) = (boot(import.kernel)?, boot(import.initrd)?);
    let (name, new_revision) = (import.name.clone(), import.new_revision);
    shared.core.call(move |core| core.free_revision(&name, new_revision)).await?;
    begin(
        &shared,
        Import {
            name: import.name,
            format: import.format,
            new_revision: import.new_revision,
            source,
            remove_source: false,
            kernel,
            initrd,
            cmdline: import.cmdline.unwrap_or_default(),
            now_us: shared.clock.now_us(),
        },
    )
}

/// Stores a kernel or an initrd.
#[utoipa::path(post, path = "/v1/blobs", tag = "images", request_body(content = Vec<u8>, content_type = "application/octet-stream"), responses((status = 201, body = Blob), (status = "default", body = Problem)))]
pub async fn put_blob(State(shared): State<Shared>, body: Body) -> Answer {
    let mut bytes = Vec::new();
    let mut stream = body.into_data_stream();
    while let Some(chunk) = stream.next().await {
        let chunk = chunk.map_err(|error| Refusal::invalid(format!("the upload broke off: {error}")))?;
        if (bytes.len() + chunk.len()) as u64 > BLOB_LIMIT {
            return Err(Refusal::invalid(format!("a boot file is at most {}", ByteLen(BLOB_LIMIT))));
        }
        bytes.extend_from_slice(&chunk);
    }
    if bytes.is_empty() {
        return Err(Refusal::invalid("the boot file is empty"));
    }
    let repository = shared.repository.clone();
    let stored = tokio::task::spawn_blocking(move || {
        let digest = repository.put_blob(&bytes)?;
        Ok::<_, Refusal>(Blob { digest, bytes: bytes.len() as u64 })
    });
    let blob =
        stored.await.map_err(|error| Refusal::new(ErrorCode::Internal, format!("store the blob: {error}")))??;
    Ok((StatusCode::CREATED, axum::Json(blob)).into_response())
}

/// What an image would take in memory.
#[utoipa::path(get, path = "/v1/images/{image}/estimate", tag = "images", params(("image" = String, Path)), responses((status = 200, body = Estimate), (status = "default", body = Problem)))]
pub async fn estimate(State(shared): State<Shared>, Name(name): Name) -> Answer {
    let estimate = shared
        .core
        .call(move |core| {
            let image = core.image(&name)?;
            Ok(Estimate {
                logical_bytes: image.logical_bytes,
                resident_bytes: image.resident_estimate_bytes,
                added_bytes: None,
                beside: Vec::new(),
                new_bytes: None,
                too_large_for: core.too_small_for(image.resident_estimate_bytes, Some(&image.digest)),
            })
        })
        .await?;
    json(estimate)
}

/// What a file of the controller's machine would take in memory. Unix socket only; reads all of it.
#[utoipa::path(post, path = "/v1/images/estimate", tag = "images", request_body = EstimateRequest, responses((status = 200, body = Estimate), (status = "default", body = Problem)))]
pub async fn estimate_file(State(shared): State<Shared>, post: Post<EstimateRequest>) -> Answer {
    let path = local_file(&post.caller, &post.value.path)?;
    let references = post.value.beside;
    let beside = shared
        .core
        .call(move |core| references.iter().map(|reference| Ok(core.image(reference)?.clone())).collect())
        .await?;
    let mut estimate = import::estimate(path, post.value.format, beside, shared.repository.clone()).await?;
    let resident = estimate.resident_bytes;
    estimate.too_large_for = shared.core.call(move |core| Ok(core.too_small_for(resident, None))).await?;
    json(estimate)
}

/// Has hosts make an image resident: begins the command `image-pull`.
#[utoipa::path(post, path = "/v1/images/{image}/pull", tag = "images", params(("image" = String, Path), ("idempotency-key" = Option<String>, Header)), request_body = PullImage, responses((status = 202, body = Command), (status = "default", body = Problem)))]
pub async fn pull(State(shared): State<Shared>, Name(name): Name, post: Post<PullImage>) -> Answer {
    post.once(&shared, StatusCode::ACCEPTED, move |core, pull, issuer| {
        let id = core.pull(&name, pull, issuer)?;
        core.command_view(id)
    })
    .await
}

/// Templates, by name.
#[utoipa::path(get, path = "/v1/templates", tag = "templates", params(ListQuery), responses((status = 200, body = Page<Template>), (status = "default", body = Problem)))]
pub async fn list_templates(State(shared): State<Shared>, Params(query): Params<ListQuery>) -> Answer {
    let templates = shared.core.call(|core| Ok(core.all_templates())).await?;
    json(paginate(templates, |t| t.name.clone(), query.cursor.as_deref(), query.limit)?)
}

/// Makes a template.
#[utoipa::path(post, path = "/v1/templates", tag = "templates", request_body = CreateTemplate, params(("idempotency-key" = Option<String>, Header)), responses((status = 201, body = Template), (status = "default", body = Problem)))]
pub async fn create_template(State(shared): State<Shared>, post: Post<CreateTemplate>) -> Answer {
    post.once(&shared, StatusCode::CREATED, |core, create, _| {
        let name = core.create_template(create)?;
        Ok(core.template_view(core.template(&name)?))
    })
    .await
}

/// One template.
#[utoipa::path(get, path = "/v1/templates/{name}", tag = "templates", params(("name" = String, Path)), responses((status = 200, body = Template), (status = "default", body = Problem)))]
pub async fn get_template(State(shared): State<Shared>, Name(name): Name) -> Answer {
    let template = shared.core.call(move |core| Ok(core.template_view(core.template(&name)?))).await?;
    let version = template.version;
    versioned(template, version)
}

/// Moves a template to another image, other applications or other limits. VMs made from it before stay as they are.
#[utoipa::path(patch, path = "/v1/templates/{name}", tag = "templates", params(("name" = String, Path), ("if-match" = Option<String>, Header)), request_body = ChangeTemplate, responses((status = 200, body = Template), (status = "default", body = Problem)))]
pub async fn change_template(
    State(shared): State<Shared>,
    Name(name): Name,
    IfMatch(version): IfMatch,
    post: Post<ChangeTemplate>,
) -> Answer {
    let change = post.value;
    let template = shared
        .core
        .call(move |core| {
            core.change_template(&name, &change, version)?;
            Ok(core.template_view(core.template(&name)?))
        })
        .await?;
    let version = template.version;
    versioned(template, version)
}

/// Deletes a template that no VM was made from.
#[utoipa::path(delete, path = "/v1/templates/{name}", tag = "templates", params(("name" = String, Path), ("if-match" = Option<String>, Header)), responses((status = 204), (status = "default", body = Problem)))]
pub async fn delete_template(State(shared): State<Shared>, Name(name): Name, IfMatch(version): IfMatch) -> Answer {
    shared.core.call(move |core| core.delete_template(&name, version)).await?;
    nothing()
}

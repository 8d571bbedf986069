//! The OpenAPI document, generated from the handlers and the types.

use utoipa::OpenApi;

use super::{command, export, extract::Answer, fleet, image, job, log, stream, system};

#[derive(OpenApi)]
#[openapi(
    info(
        title = "Muster controller",
        description = "Runs fleets of virtual desktops from memory and commands them as groups. Errors are problem bodies (RFC 9457) whose `code` is stable. In lab mode every answer has the header `muster-lab: true`.",
        license(name = "Apache-2.0")
    ),
    paths(
        system::status,
        system::doctor,
        system::top,
        fleet::list_hosts,
        fleet::get_host,
        fleet::forget_host,
        fleet::host_metrics,
        fleet::vm_metrics,
        fleet::volume_metrics,
        fleet::list_stores,
        fleet::get_store,
        fleet::list_vms,
        fleet::create_vms,
        fleet::get_vm,
        fleet::delete_vm,
        stream::screenshot,
        stream::console,
        stream::vnc,
        fleet::list_volumes,
        fleet::list_backups,
        fleet::list_groups,
        fleet::create_group,
        fleet::get_group,
        fleet::change_group,
        fleet::delete_group,
        image::list,
        image::import,
        image::import_by_path,
        image::estimate_file,
        image::get,
        image::delete,
        image::estimate,
        image::pull,
        image::verify,
        image::commit,
        export::export,
        image::put_blob,
        image::list_templates,
        image::create_template,
        image::get_template,
        image::change_template,
        image::delete_template,
        job::list,
        job::get,
        job::events,
        command::list,
        command::create,
        command::get,
        command::events,
        log::events,
        log::usage,
    )
)]
struct Document;

/// The document as JSON text.
pub fn document() -> String {
    // generated from constants: there is nothing in it that cannot be written
    Document::openapi().to_pretty_json().unwrap_or_default()
}

pub async fn serve() -> Answer {
    use axum::{http::header, response::IntoResponse};
    Ok(([(header::CONTENT_TYPE, "application/json")], document()).into_response())
}

#[cfg(test)]
mod tests {
    use std::fmt::Write;

    use serde_json::Value;

    use super::*;

    #[test]
    fn the_document_describes_every_route_of_the_table() {
        let document: Value = serde_json::from_str(&document()).unwrap();
        let table = include_str!("mod.rs");
        let mut routes = 0;
        for line in table.lines().map(str::trim).filter(|line| line.starts_with(".route(\"")) {
            let path = line.split('"').nth(1).unwrap();
            routes += 1;
            if path != "/openapi.json" {
                let described = &document["paths"][format!("/v1{path}")];
                assert!(described.is_object(), "{path} is not described");
                for method in ["get", "post", "patch", "delete"] {
                    assert_eq!(line.contains(&format!("{method}(")), described[method].is_object(), "{method} {path}");
                }
            }
        }
        assert!(routes > 30, "the table was not found");
        assert!(document["components"]["schemas"]["Problem"].is_object());
    }

    /// The outline: operations with their answers, types with their fields; `!` is required.
    #[test]
    fn the_outline_of_the_document_is_the_known_one() {
        let document: Value = serde_json::from_str(&document()).unwrap();
        let names = |value: &Value| value.as_object().into_iter().flatten().map(|(k, _)| k.clone()).collect::<Vec<_>>();
        let mut text = String::new();
        for (path, methods) in document["paths"].as_object().unwrap() {
            for (method, operation) in methods.as_object().unwrap() {
                let answers = names(&operation["responses"]).join(" ");
                writeln!(text, "{} {path}: {answers}", method.to_uppercase()).unwrap();
            }
        }
        for (name, schema) in document["components"]["schemas"].as_object().unwrap() {
            let required: Vec<&str> =
                schema["required"].as_array().into_iter().flatten().filter_map(Value::as_str).collect();
            let fields = names(&schema["properties"]).into_iter().map(|field| {
                let mark = if required.contains(&field.as_str()) { "!" } else { "" };
                format!("{field}{mark}")
            });
            let literals = schema["enum"].as_array().into_iter().flatten().map(Value::to_string);
            writeln!(text, "{name}: {}", fields.chain(literals).collect::<Vec<_>>().join(" ")).unwrap();
        }
        insta::assert_snapshot!(text);
    }
}

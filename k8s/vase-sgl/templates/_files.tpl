{{/* Contents of a file with its @names@ filled in. Context: (dict "root" $ "file" "…" "values" (dict …)). */}}
{{- define "vase-sgl.fill" -}}
{{- $text := .root.Files.Get .file -}}
{{- range $name, $metric := .root.Files.Get "files/gateway-metrics.yaml" | fromYaml -}}
{{- $text = $text | replace (printf "@%s@" $name) $metric -}}
{{- end -}}
{{- range $name, $value := .values -}}
{{- $text = $text | replace (printf "@%s@" $name) ($value | toString) -}}
{{- end -}}
{{- $text -}}
{{- end -}}

{{/* Findings of checkov that do not fit, with the reason: annotations for `make chart-security`. */}}
{{- define "vase-sgl.scanPullPolicy" -}}
checkov.io/skip1: CKV_K8S_15=Pinned by version or digest; a worker must be able to restart while the registry is away
{{- end -}}
{{- define "vase-sgl.scanSecretEnv" -}}
checkov.io/skip2: CKV_K8S_35=The program takes URLs and keys as variables; they are references to Secrets
{{- end -}}
{{- define "vase-sgl.scanRunsOnce" -}}
checkov.io/skip3: CKV_K8S_8=Runs once and ends
checkov.io/skip4: CKV_K8S_9=Runs once and ends
{{- end -}}

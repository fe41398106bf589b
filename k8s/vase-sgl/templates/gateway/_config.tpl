{{/*
The one place that knows the gateway's configuration: its keys (vase_sgl/gateway/config.py), the
variables that carry secrets into it, its health services and its commands.
*/}}

{{- define "vase-sgl.gatewayConfig" -}}
{{- $gateway := .Values.gateway -}}
{{- $worker := dict -}}
{{- $groups := list (include "vase-sgl.stableGroup" . | fromYaml) -}}
{{- if and .Values.canary.enabled .Values.canary.inRotation -}}
{{- $groups = append $groups (include "vase-sgl.canaryGroup" . | fromYaml) -}}
{{- end -}}
{{- $urls := list -}}
{{- $dns := list -}}
{{- range $groups -}}
{{- $group := set . "root" $ -}}
{{- $urls = concat $urls (include "vase-sgl.workerUrls" $group | fromYamlArray) -}}
{{- $dns = append $dns (printf "%s://%s.%s.svc:%d" (include "vase-sgl.workerScheme" $) (include "vase-sgl.workerService" $group) $.Release.Namespace (int .worker.port)) -}}
{{- end -}}
{{- if eq $gateway.workerDiscovery "list" -}}
{{- if not $urls -}}
{{- fail "a list of no workers: without replicas set gateway.workerDiscovery=dns, which finds workers when they come" -}}
{{- end -}}
{{- $_ := set $worker "urls" $urls -}}
{{- else -}}
{{- $_ := set $worker "dns" $dns -}}
{{- end -}}
{{- if (.Values.worker.tls).existingSecret -}}
{{- $_ := set $worker "ca_file" "/etc/vase-sgl/worker-ca/ca.crt" -}}
{{- end -}}
{{- $config := dict
  "listen" (dict "host" "0.0.0.0" "port" (int $gateway.service.port))
  "worker" $worker
  "tenants_file" (printf "/etc/vase-sgl/tenants/%s" $gateway.tenants.key)
  "drain_seconds" $gateway.drainSeconds -}}
{{- $audit := dict -}}
{{- if eq $gateway.audit.store "sqlite" -}}
{{- $_ := set $audit "url" "sqlite+aiosqlite:////var/lib/vase-sgl/audit.sqlite3" -}}
{{- end -}}
{{- if $gateway.audit.encryption.secret -}}
{{- $keys := list -}}
{{- range $gateway.audit.encryption.versions -}}
{{- $keys = append $keys (dict "version" (int .) "file" (printf "/etc/vase-sgl/audit-keys/%d" (int .))) -}}
{{- end -}}
{{- $_ := set $audit "encryption_keys" $keys -}}
{{- end -}}
{{- with $audit -}}
{{- $_ := set $config "audit" . -}}
{{- end -}}
{{- if $gateway.tls.enabled -}}
{{- $tls := dict "certificate" "/etc/vase-sgl/tls/tls.crt" "key" "/etc/vase-sgl/tls/tls.key" -}}
{{- if $gateway.tls.clientAuth.caSecret -}}
{{- $_ := set $tls "client_ca" "/etc/vase-sgl/client-ca/ca.crt" -}}
{{- end -}}
{{- $_ := set $config "tls" $tls -}}
{{- end -}}
{{- with $gateway.defaultEviction -}}
{{- $_ := set $config "default_eviction" . -}}
{{- end -}}
{{- if (.Values.worker.inspect).enabled -}}
{{- $_ := set $config "allow_inspect" true -}}
{{- end -}}
{{- if $gateway.metrics.enabled -}}
{{- $_ := set $config "telemetry" (dict "metrics_port" (int $gateway.metrics.port)) -}}
{{- end -}}
{{- if $gateway.http.enabled -}}
{{- $_ := set $config "http" (dict "port" (int $gateway.http.port)) -}}
{{- end -}}
{{- toYaml (mergeOverwrite $config (deepCopy $gateway.config)) -}}
{{- end -}}

{{/*
Secrets reach the gateway as variables, which override the file. SQLite's URL is the file's own, for
`vase-sgl audit` in the container.
*/}}
{{- define "vase-sgl.gatewayUrlEnv" -}}
- name: VASE_AUDIT__URL
{{- if eq .Values.gateway.audit.store "postgresql" }}
  valueFrom:
    secretKeyRef: {{- toYaml .Values.gateway.audit.postgresql.urlSecret | nindent 6 }}
{{- else }}
  value: {{ (include "vase-sgl.gatewayConfig" . | fromYaml).audit.url | quote }}
{{- end }}
{{- if .Values.gateway.redis.urlSecret.name }}
- name: VASE_LIMITS__REDIS_URL
  valueFrom:
    secretKeyRef: {{- toYaml .Values.gateway.redis.urlSecret | nindent 6 }}
{{- end }}
{{- end -}}

{{- define "vase-sgl.migrateArgs" -}}
[audit, migrate]
{{- end -}}

{{- define "vase-sgl.gatewayArgs" -}}
- serve
- --config=/etc/vase-sgl/config/gateway.yaml
- --log-level={{ .Values.gateway.logLevel }}
- --log-format={{ .Values.gateway.logFormat }}
{{- end -}}

{{/* Readiness: a worker is ready. Liveness: the process answers, workers or not. */}}
{{- define "vase-sgl.readinessService" }}readiness{{ end -}}
{{- define "vase-sgl.livenessService" }}liveness{{ end -}}

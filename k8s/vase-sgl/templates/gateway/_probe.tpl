{{/*
A health check of the gateway. Context: (dict "root" $ "service" "…"). The kubelet's own gRPC probe
cannot do TLS, so behind TLS the image's client of the same protocol asks.
*/}}
{{- define "vase-sgl.grpcProbe" -}}
{{- $gateway := .root.Values.gateway -}}
{{- if $gateway.tls.enabled -}}
exec:
  command:
    - vase-grpc-health
    - --target=127.0.0.1:{{ $gateway.service.port }}
    - --service={{ .service }}
    - --timeout=8
    # The gateway shows what it has read; the files may have been renewed since.
    - --trust-any
    - --server-name={{ include "vase-sgl.tlsServerName" .root }}
    {{- if $gateway.tls.clientAuth.probeSecret }}
    - --certificate=/etc/vase-sgl/probe/tls.crt
    - --key=/etc/vase-sgl/probe/tls.key
    {{- end }}
{{- else -}}
grpc: {port: {{ $gateway.service.port }}, service: {{ .service | quote }}}
{{- end -}}
{{- end -}}

{{- define "vase-sgl.tlsServerName" -}}
{{- default (printf "%s-gateway.%s.svc" (include "vase-sgl.fullname" .) .Release.Namespace) .Values.gateway.tls.serverName -}}
{{- end -}}

{{- define "vase-sgl.tlsSecret" -}}
{{- default (printf "%s-gateway-tls" (include "vase-sgl.fullname" .)) .Values.gateway.tls.existingSecret -}}
{{- end -}}

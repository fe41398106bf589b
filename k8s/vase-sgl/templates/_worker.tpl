{{/*
A worker group is (dict "root" $ "name" … "track" "stable|canary" "worker" <values> "modelPath" …).
Stable and canary differ in values only.
*/}}
{{- define "vase-sgl.stableGroup" -}}
{{- $group := dict "name" (printf "%s-worker" (include "vase-sgl.fullname" .)) "track" "stable" "worker" .Values.worker "modelPath" .Values.model.path -}}
{{- toYaml $group -}}
{{- end -}}

{{/* Kubernetes adds up to 11 characters of a hash to a StatefulSet's name, for a label of 63. */}}
{{- define "vase-sgl.canaryGroup" -}}
{{- $worker := deepCopy .Values.worker -}}
{{- $_ := set $worker "replicas" .Values.canary.replicas -}}
{{- $_ := set $worker "updatePartition" 0 -}}
{{- $_ := set $worker "extraArgs" (concat $worker.extraArgs .Values.canary.extraArgs) -}}
{{- $_ := set $worker "checkIntegrity" (or $worker.checkIntegrity .Values.canary.checkIntegrity) -}}
{{- $_ := set $worker.autoscaling "mode" "none" -}}
{{- with .Values.canary.evictionDefault -}}{{- $_ := set $worker.eviction "default" . -}}{{- end -}}
{{- with .Values.canary.image.repository -}}{{- $_ := set $worker.image "repository" . -}}{{- end -}}
{{- if or .Values.canary.image.tag .Values.canary.image.digest -}}
{{- $_ := set $worker.image "tag" .Values.canary.image.tag -}}
{{- $_ := set $worker.image "digest" .Values.canary.image.digest -}}
{{- end -}}
{{- $group := dict "name" (printf "%s-worker-canary" (include "vase-sgl.fullname" . | trunc 37 | trimSuffix "-")) "track" "canary" "worker" $worker "modelPath" (default .Values.model.path .Values.canary.modelPath) -}}
{{- toYaml $group -}}
{{- end -}}

{{- define "vase-sgl.workerSelector" -}}
{{ include "vase-sgl.selector" .root }}
app.kubernetes.io/component: worker
vase-sgl/track: {{ .track }}
{{- end -}}

{{- define "vase-sgl.workerLabels" -}}
{{ include "vase-sgl.labels" (dict "root" .root "component" "worker") }}
vase-sgl/track: {{ .track }}
{{- end -}}

{{/* Headless Service whose addresses are exactly the pods that answer HTTP. */}}
{{- define "vase-sgl.workerService" -}}
{{ .name }}{{ if .worker.multiNode.enabled }}-leaders{{ end }}
{{- end -}}

{{- define "vase-sgl.workerMost" -}}
{{- if eq .worker.autoscaling.mode "none" }}{{ .worker.replicas }}{{ else }}{{ .worker.autoscaling.maxReplicas }}{{ end -}}
{{- end -}}

{{- define "vase-sgl.workerScheme" -}}
{{- if (.Values.worker.tls).existingSecret }}https{{ else }}http{{ end -}}
{{- end -}}

{{/* URLs of a group by ordinal, one per line. In a LeaderWorkerSet NAME-0 is the first leader. */}}
{{- define "vase-sgl.workerUrls" -}}
{{- range $ordinal := until (int (include "vase-sgl.workerMost" .)) }}
- {{ include "vase-sgl.workerScheme" $.root }}://{{ $.name }}-{{ $ordinal }}.{{ $.name }}.{{ $.root.Release.Namespace }}.svc:{{ $.worker.port }}
{{- end }}
{{- end -}}

{{- define "vase-sgl.gpusPerPod" -}}
{{- div (mul .worker.tensorParallelSize .worker.pipelineParallelSize) (ternary .worker.multiNode.nodes 1 .worker.multiNode.enabled) -}}
{{- end -}}

{{/* Arguments of `vase-sgl`. */}}
{{- define "vase-sgl.workerArgs" -}}
- worker
- --model-path={{ .modelPath }}
{{- with .root.Values.model.servedName }}
- --served-model-name={{ . }}
{{- end }}
- --host=0.0.0.0
- --port={{ .worker.port }}
- --enable-metrics
- --incremental-streaming-output
{{- if gt (int .worker.tensorParallelSize) 1 }}
- --tp-size={{ .worker.tensorParallelSize }}
{{- end }}
{{- if gt (int .worker.pipelineParallelSize) 1 }}
- --pp-size={{ .worker.pipelineParallelSize }}
{{- end }}
{{- if .worker.multiNode.enabled }}
- --nnodes=$(LWS_GROUP_SIZE)
- --node-rank=$(LWS_WORKER_INDEX)
- --dist-init-addr=$(LWS_LEADER_ADDRESS):{{ .worker.multiNode.rendezvousPort }}
{{- end }}
{{- if .worker.deterministic }}
- --enable-deterministic-inference
{{- end }}
{{- with .worker.attentionBackend }}
- --attention-backend={{ . }}
{{- end }}
{{- with .worker.contextLength }}
- --context-length={{ . | int }}
{{- end }}
{{- with .worker.maxRunningRequests }}
- --max-running-requests={{ . | int }}
{{- end }}
{{- with .worker.memFractionStatic }}
- --mem-fraction-static={{ . }}
{{- end }}
{{- with .worker.eviction.default }}
- {{ printf "--vase-default=%s" (toJson .) | squote }}
{{- end }}
{{- with .worker.eviction.maxBudget }}
- --vase-max-budget={{ . | int }}
{{- end }}
{{- with .worker.eviction.maxWindow }}
- --vase-max-window={{ . | int }}
{{- end }}
{{- if (.worker.inspect).enabled }}
- --vase-inspect-dir=/var/lib/vase-sgl/kept
{{- end }}
{{- if (.worker.tls).existingSecret }}
- --ssl-certfile=/etc/vase-sgl/tls/tls.crt
- --ssl-keyfile=/etc/vase-sgl/tls/tls.key
{{- end }}
{{- range .worker.extraArgs }}
- {{ . | quote }}
{{- end }}
{{- end -}}

{{/* The key of the workers, in the pods of both sides. */}}
{{- define "vase-sgl.workerKeyEnv" -}}
{{- if .Values.worker.apiKeySecret.name }}
- name: VASE_WORKER__API_KEY
  valueFrom:
    secretKeyRef: {{- toYaml .Values.worker.apiKeySecret | nindent 6 }}
{{- end }}
{{- end -}}

{{- define "vase-sgl.workerPod" -}}
{{- $model := .root.Values.model -}}
metadata:
  labels:
    {{- include "vase-sgl.podLabels" (dict "root" .root "component" "worker") | nindent 4 }}
    vase-sgl/track: {{ .track }}
  {{- with .worker.podAnnotations }}
  annotations: {{- toYaml . | nindent 4 }}
  {{- end }}
spec:
  serviceAccountName: {{ include "vase-sgl.fullname" .root }}-worker
  {{- include "vase-sgl.podSecurity" .root | nindent 2 }}
  {{- include "vase-sgl.scheduling" (dict "values" .worker "selector" (include "vase-sgl.workerSelector" .)) | nindent 2 }}
  {{- with .worker.runtimeClassName }}
  runtimeClassName: {{ . }}
  {{- end }}
  terminationGracePeriodSeconds: {{ add .worker.drain.preStopSeconds .worker.drain.timeoutSeconds 30 }}
  containers:
    - name: worker
      image: {{ include "vase-sgl.image" (dict "root" .root "image" .worker.image) }}
      imagePullPolicy: {{ .worker.image.pullPolicy }}
      args: {{- include "vase-sgl.workerArgs" . | nindent 8 }}
      env:
        - {name: HOME, value: /home/vase}
        - {name: PYTHONDONTWRITEBYTECODE, value: "1"}
        {{- if $model.download }}
        - {name: HF_HOME, value: {{ $model.cache.mountPath }}/huggingface}
        {{- else }}
        {{- $named := list }}
        {{- range .worker.env }}{{ $named = append $named .name }}{{ end }}
        {{- if not (or (has "HF_HOME" $named) (has "HF_HUB_CACHE" $named)) }}
        # Where downloads were put; the rest of HF_HOME must be writable.
        - {name: HF_HUB_CACHE, value: {{ $model.cache.mountPath }}/huggingface/hub}
        {{- end }}
        - {name: HF_HUB_OFFLINE, value: "1"}
        {{- end }}
        {{- with $model.tokenSecret.name }}
        - name: HF_TOKEN
          valueFrom:
            secretKeyRef: {name: {{ . }}, key: {{ $model.tokenSecret.key }}}
        {{- end }}
        {{- if .worker.checkIntegrity }}
        - {name: VASE_CHECK_INTEGRITY, value: "1"}
        # A volume that a restarted container finds again.
        - {name: VASE_INTEGRITY_LOG, value: /home/vase/integrity.log}
        {{- end }}
        {{- include "vase-sgl.workerKeyEnv" .root | nindent 8 }}
        {{- with .worker.env }}
        {{- toYaml . | nindent 8 }}
        {{- end }}
      ports:
        - {name: http, containerPort: {{ .worker.port }}, protocol: TCP}
      {{- include "vase-sgl.containerSecurity" . | nindent 6 }}
      {{- $resources := deepCopy .worker.resources }}
      {{- if .worker.gpu.enabled }}
      {{- range $kind := list "requests" "limits" }}
      {{- $_ := set $resources $kind (merge (dict $.worker.gpu.resource (include "vase-sgl.gpusPerPod" $)) (default dict (get $resources $kind))) }}
      {{- end }}
      {{- end }}
      resources: {{- toYaml $resources | nindent 8 }}
      {{- $health := printf "{path: /health, port: http%s}" (ternary ", scheme: HTTPS" "" (eq (include "vase-sgl.workerScheme" .root) "https")) }}
      {{- /* A worker that failed these has nothing to drain; the preStop hook counts as well. */}}
      {{- $hung := add .worker.drain.preStopSeconds 30 }}
      # Loading ends with SGLang's own warm-up; until then /health is 503.
      startupProbe:
        httpGet: {{ $health }}
        periodSeconds: 10
        timeoutSeconds: 25
        failureThreshold: {{ divf .worker.startup.timeoutSeconds 10 | ceil }}
        terminationGracePeriodSeconds: {{ $hung }}
      readinessProbe:
        httpGet: {{ $health }}
        periodSeconds: 10
        timeoutSeconds: 25
        failureThreshold: 3
      livenessProbe:
        httpGet: {{ $health }}
        periodSeconds: {{ .worker.liveness.periodSeconds }}
        timeoutSeconds: 25
        failureThreshold: {{ .worker.liveness.failureThreshold }}
        terminationGracePeriodSeconds: {{ $hung }}
      # On SIGTERM SGLang answers what runs, and then ends.
      lifecycle:
        preStop:
          exec: {command: [sleep, {{ .worker.drain.preStopSeconds | quote }}]}
      volumeMounts:
        - {name: home, mountPath: /home/vase}
        - {name: tmp, mountPath: /tmp}
        - {name: shm, mountPath: /dev/shm}
        {{- if (.worker.inspect).enabled }}
        - {name: kept, mountPath: /var/lib/vase-sgl/kept}
        {{- end }}
        {{- if (.worker.tls).existingSecret }}
        - {name: tls, mountPath: /etc/vase-sgl/tls, readOnly: true}
        {{- end }}
        - name: models
          mountPath: {{ $model.cache.mountPath }}
          {{- if not $model.download }}
          readOnly: true
          {{- end }}
        {{- with .worker.volumeMounts }}
        {{- toYaml . | nindent 8 }}
        {{- end }}
  volumes:
    - name: home
      emptyDir: {sizeLimit: {{ .worker.scratchSize }}}
    - name: tmp
      emptyDir: {sizeLimit: {{ .worker.scratchSize }}}
    - name: shm
      emptyDir: {medium: Memory, sizeLimit: {{ .worker.shmSize }}}
    {{- if (.worker.inspect).enabled }}
    - name: kept
      emptyDir: {sizeLimit: {{ (.worker.inspect).sizeLimit }}}
    {{- end }}
    {{- with (.worker.tls).existingSecret }}
    - name: tls
      secret: {secretName: {{ . }}, defaultMode: 0440}
    {{- end }}
    - name: models
      {{- if eq $model.cache.type "pvc" }}
      persistentVolumeClaim:
        claimName: {{ default (printf "%s-models" (include "vase-sgl.fullname" .root)) $model.cache.pvc.existingClaim }}
      {{- else if eq $model.cache.type "hostPath" }}
      hostPath: {path: {{ $model.cache.hostPath.path }}, type: Directory}
      {{- else if eq $model.cache.type "image" }}
      image: {reference: {{ $model.cache.image.reference }}, pullPolicy: {{ $model.cache.image.pullPolicy }}}
      {{- else }}
      emptyDir: {sizeLimit: {{ $model.cache.emptyDir.sizeLimit }}}
      {{- end }}
    {{- with .worker.volumes }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
{{- end -}}

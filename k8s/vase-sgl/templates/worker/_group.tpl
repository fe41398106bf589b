{{- define "vase-sgl.workerGroup" -}}
{{- if .worker.multiNode.enabled }}
{{- include "vase-sgl.workerLws" . }}
{{- else }}
{{- include "vase-sgl.workerStatefulSet" . }}
{{- end }}
---
apiVersion: v1
kind: Service
metadata:
  name: {{ include "vase-sgl.workerService" . }}
  labels: {{- include "vase-sgl.workerLabels" . | nindent 4 }}
spec:
  clusterIP: None
  selector:
    {{- include "vase-sgl.workerSelector" . | nindent 4 }}
    {{- if .worker.multiNode.enabled }}
    leaderworkerset.sigs.k8s.io/worker-index: "0"
    {{- end }}
  ports:
    - {name: http, port: {{ .worker.port }}, targetPort: http, protocol: TCP}
{{- if .worker.podDisruptionBudget.enabled }}
---
apiVersion: policy/v1
kind: PodDisruptionBudget
metadata:
  name: {{ .name }}
  labels: {{- include "vase-sgl.workerLabels" . | nindent 4 }}
spec:
  maxUnavailable: {{ .worker.podDisruptionBudget.maxUnavailable }}
  unhealthyPodEvictionPolicy: AlwaysAllow
  selector:
    matchLabels: {{- include "vase-sgl.workerSelector" . | nindent 6 }}
{{- end }}
{{- end -}}

{{- define "vase-sgl.workerStatefulSet" }}
apiVersion: apps/v1
kind: StatefulSet
metadata:
  name: {{ .name }}
  labels: {{- include "vase-sgl.workerLabels" . | nindent 4 }}
  annotations:
    {{- include "vase-sgl.scanPullPolicy" . | nindent 4 }}
    {{- include "vase-sgl.scanSecretEnv" . | nindent 4 }}
spec:
  serviceName: {{ .name }}
  {{- if eq .worker.autoscaling.mode "none" }}
  replicas: {{ .worker.replicas }}
  {{- end }}
  # Workers do not know of each other.
  podManagementPolicy: Parallel
  # Until gateways have looked its name up and asked it, the one before stays.
  minReadySeconds: 20
  updateStrategy:
    type: RollingUpdate
    rollingUpdate: {partition: {{ .worker.updatePartition }}}
  selector:
    matchLabels: {{- include "vase-sgl.workerSelector" . | nindent 6 }}
  template: {{- include "vase-sgl.workerPod" . | nindent 4 }}
{{- end -}}

{{/* One pod template for leader and workers: they differ in the rank that the operator tells them. */}}
{{- define "vase-sgl.workerLws" }}
apiVersion: leaderworkerset.x-k8s.io/v1
kind: LeaderWorkerSet
metadata:
  name: {{ .name }}
  labels: {{- include "vase-sgl.workerLabels" . | nindent 4 }}
spec:
  {{- if eq .worker.autoscaling.mode "none" }}
  replicas: {{ .worker.replicas }}
  {{- end }}
  leaderWorkerTemplate:
    size: {{ .worker.multiNode.nodes }}
    # A rank that is gone takes its group's tensors with it.
    restartPolicy: RecreateGroupOnPodRestart
    workerTemplate: {{- include "vase-sgl.workerPod" . | nindent 6 }}
{{- end -}}

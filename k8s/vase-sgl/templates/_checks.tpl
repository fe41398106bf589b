{{/* Mixes of values that cannot work, refused with what to do. */}}
{{- define "vase-sgl.checks" -}}
{{- $g := .Values.gateway -}}
{{- $w := .Values.worker -}}
{{- if and (eq $g.audit.store "sqlite") (or $g.autoscaling.enabled (gt (int $g.replicas) 1)) -}}
{{- fail "several gateways cannot share one SQLite file: set gateway.audit.store=postgresql, or gateway.replicas=1 without gateway.autoscaling" -}}
{{- end -}}
{{- if and $g.tls.enabled (not $g.tls.existingSecret) (not $g.tls.certManager.enabled) -}}
{{- fail "gateway.tls.enabled needs a certificate: set gateway.tls.existingSecret or gateway.tls.certManager.enabled" -}}
{{- end -}}
{{- if and $g.tls.certManager.enabled $g.tls.existingSecret -}}
{{- fail "gateway.tls.existingSecret and gateway.tls.certManager.enabled exclude each other" -}}
{{- end -}}
{{- if and $g.tls.certManager.enabled (not $g.tls.enabled) -}}
{{- fail "gateway.tls.certManager.enabled needs gateway.tls.enabled" -}}
{{- end -}}
{{- if and $g.tls.certManager.enabled (not $g.tls.certManager.issuerRef.name) -}}
{{- fail "gateway.tls.certManager needs issuerRef.name" -}}
{{- end -}}
{{- if and $g.tls.clientAuth.caSecret (or (not $g.tls.enabled) (not $g.tls.clientAuth.probeSecret)) -}}
{{- fail "gateway.tls.clientAuth.caSecret needs gateway.tls.enabled and clientAuth.probeSecret: probes need a certificate as well" -}}
{{- end -}}
{{- if and (eq .Values.model.cache.type "image") (not .Values.model.cache.image.reference) -}}
{{- fail "model.cache.type=image needs model.cache.image.reference" -}}
{{- end -}}
{{- if and (eq .Values.model.cache.type "image") .Values.model.download -}}
{{- fail "an image volume is read-only: set model.download=false and model.path to a folder under model.cache.mountPath" -}}
{{- end -}}
{{- $gpus := mul $w.tensorParallelSize $w.pipelineParallelSize -}}
{{- if $w.multiNode.enabled -}}
{{- if ne (mod $gpus $w.multiNode.nodes) 0 -}}
{{- fail (printf "worker.tensorParallelSize x pipelineParallelSize (%d) must be a multiple of worker.multiNode.nodes (%d)" $gpus (int $w.multiNode.nodes)) -}}
{{- end -}}
{{- if gt (int $w.updatePartition) 0 -}}
{{- fail "worker.updatePartition belongs to a StatefulSet; with worker.multiNode use the canary group" -}}
{{- end -}}
{{- end -}}
{{- if and ($w.tls).existingSecret (ne $g.workerDiscovery "list") -}}
{{- fail "worker.tls.existingSecret needs gateway.workerDiscovery=list: a certificate names workers, and the look-up of a Service gives addresses" -}}
{{- end -}}
{{- if and ($w.tls).existingSecret $w.multiNode.enabled -}}
{{- fail "worker.tls.existingSecret with worker.multiNode: the ranks behind a leader answer probes in clear text only" -}}
{{- end -}}
{{- if and (ne $w.autoscaling.mode "none") (gt (int $w.autoscaling.minReplicas) (int $w.autoscaling.maxReplicas)) -}}
{{- fail "worker.autoscaling.minReplicas is above maxReplicas" -}}
{{- end -}}
{{- if and $w.autoscaling.keda.authModes (not $w.autoscaling.keda.authenticationRef) -}}
{{- fail "worker.autoscaling.keda.authModes needs authenticationRef: the credentials are there" -}}
{{- end -}}
{{- if and $g.autoscaling.enabled (gt (int $g.autoscaling.minReplicas) (int $g.autoscaling.maxReplicas)) -}}
{{- fail "gateway.autoscaling.minReplicas is above maxReplicas" -}}
{{- end -}}
{{- if and .Values.monitoring.serviceMonitor.enabled (not $g.metrics.enabled) -}}
{{- fail "monitoring.serviceMonitor needs gateway.metrics.enabled" -}}
{{- end -}}
{{- if and .Values.networkPolicy.enabled (not .Values.networkPolicy.gatewayEgress) (or (eq $g.audit.store "postgresql") $g.redis.urlSecret.name) -}}
{{- fail "gateways reach neither PostgreSQL nor Redis: name where these run in networkPolicy.gatewayEgress (any rule will do if policies of your own let gateways out), or set networkPolicy.enabled=false" -}}
{{- end -}}
{{- if and .Values.canary.enabled .Values.canary.inRotation (or .Values.canary.modelPath .Values.canary.evictionDefault) -}}
{{- fail "workers in rotation serve one model with one default, for the gateway tokenizes and completes a request before it picks one: set canary.inRotation=false with canary.modelPath or canary.evictionDefault" -}}
{{- end -}}
{{- if ge (int .Values.helmTest.window) (int .Values.helmTest.budget) -}}
{{- fail "helmTest.window must be below helmTest.budget" -}}
{{- end -}}
{{- end -}}

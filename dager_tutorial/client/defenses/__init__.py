"""What a client does to its gradients before it sends them: defences are records that are called, `chain` applies many.

Chapter `14_defences`.
"""
